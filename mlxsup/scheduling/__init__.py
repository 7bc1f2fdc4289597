"""Decides who runs, waits and goes. No process, no socket, no clock, no await."""
