"""FLUX.1, FLUX.2 Klein, Z-Image and Qwen-Image by mflux's own classes (mflux 0.24; the extra `mflux`).

What was run: on Linux's CPU a whole FLUX.2 Klein with small random weights, through the runner, and the steps of the other
three with small models put together by hand; see tests/real. Real weights were not, and nothing here was ever run on Metal or CUDA.
"""
