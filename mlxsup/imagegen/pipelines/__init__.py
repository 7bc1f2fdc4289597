"""The kinds of image models that the runner can load, behind one small protocol."""
