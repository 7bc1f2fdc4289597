"""The image runner: the process at the other end of the wire, which makes pictures with one model over HTTP."""
