"""What runners really write when they die: cause, output, and the line of it that says why.

From MLX, PyTorch, llama.cpp, CPython, the dynamic loaders of Linux and macOS, Go, Rust, Node and uvicorn, paths shortened.
"""

from __future__ import annotations

from mlxsup.runners.output import Cause

_MLX_BUFFER = (
    "RuntimeError: [metal::malloc] Attempting to allocate 48736917632 bytes which is greater than the maximum allowed "
    "buffer size of 30150672384 bytes."
)
_MLX_MEMORY = (
    "libc++abi: terminating due to uncaught exception of type std::runtime_error: [METAL] Command buffer execution "
    "failed: Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)"
)
_MLX_TIMEOUT = (
    "libc++abi: terminating due to uncaught exception of type std::runtime_error: [METAL] Command buffer execution "
    "failed: Caused GPU Timeout Error (00000002:kIOGPUCommandBufferCallbackErrorTimeout)"
)
_TORCH = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 23.64 GiB "
    "of which 11.69 MiB is free."
)
_LOADER = (
    "./llama-server: error while loading shared libraries: libcudart.so.12: cannot open shared object file: "
    "No such file or directory"
)
_TRACE = 'Traceback (most recent call last):\n  File "server.py", line 12, in <module>\n    main()\n'

SAMPLES: dict[str, tuple[Cause, str, str]] = {
    "mlx, buffer too large": (
        "out_of_memory",
        f"{_TRACE}{_MLX_BUFFER}\n\nAt:\n  server.py(331): _inner",
        _MLX_BUFFER,
    ),
    "mlx, metal out of memory": ("out_of_memory", f"loading\n{_MLX_MEMORY}\nAbort trap: 6", _MLX_MEMORY),
    "mlx, malloc": (
        "out_of_memory",
        f"{_TRACE}RuntimeError: [malloc_or_wait] Unable to allocate 123456789 bytes.",
        "RuntimeError: [malloc_or_wait] Unable to allocate 123456789 bytes.",
    ),
    "torch, cuda": ("out_of_memory", f"{_TRACE}{_TORCH}", _TORCH),
    "cuda runtime": (
        "out_of_memory",
        "CUDA error: out of memory\n  current device: 0, in function ggml_cuda_malloc at ggml-cuda.cu:123\n"
        "/build/ggml-cuda.cu:70: CUDA error",
        "CUDA error: out of memory",
    ),
    "llama.cpp": (
        "out_of_memory",
        "ggml_backend_cuda_buffer_type_alloc_buffer: allocating 12288.00 MiB on device 0: cudaMalloc failed: "
        "out of memory\n"
        "alloc_tensor_range: failed to allocate CUDA0 buffer of size 12884901888\n"
        "llama_model_load: error loading model: unable to allocate CUDA0 buffer\n"
        "common_init_from_params: failed to load model 'm.gguf'\n"
        "main: exiting due to model loading error",
        "llama_model_load: error loading model: unable to allocate CUDA0 buffer",
    ),
    "python": ("out_of_memory", f"{_TRACE}MemoryError", "MemoryError"),
    "numpy": (
        "out_of_memory",
        f"{_TRACE}numpy._core._exceptions._ArrayMemoryError: Unable to allocate 7.28 TiB for an array with shape "
        "(1000000, 1000000) and data type float64",
        "numpy._core._exceptions._ArrayMemoryError: Unable to allocate 7.28 TiB for an array with shape "
        "(1000000, 1000000) and data type float64",
    ),
    "python, fork": (
        "out_of_memory",
        f"{_TRACE}OSError: [Errno 12] Cannot allocate memory",
        "OSError: [Errno 12] Cannot allocate memory",
    ),
    "c++, bad_alloc": (
        "out_of_memory",
        "terminate called after throwing an instance of 'std::bad_alloc'\n  what():  std::bad_alloc\n"
        "Aborted (core dumped)",
        "what():  std::bad_alloc",
    ),
    "go, memory": (
        "out_of_memory",
        "fatal error: runtime: out of memory\n\nruntime stack:\nruntime.throw({0x1, 0x2})",
        "fatal error: runtime: out of memory",
    ),
    "python, module": (
        "missing_library",
        f"{_TRACE}ModuleNotFoundError: No module named 'mlx'",
        "ModuleNotFoundError: No module named 'mlx'",
    ),
    "python, -m": (
        "missing_library",
        "/usr/bin/python3: Error while finding module specification for 'mlx_lm.server' (ModuleNotFoundError: "
        "No module named 'mlx_lm')",
        "/usr/bin/python3: Error while finding module specification for 'mlx_lm.server' (ModuleNotFoundError: "
        "No module named 'mlx_lm')",
    ),
    "python, shared object": (
        "missing_library",
        f"{_TRACE}ImportError: libmlx.so: cannot open shared object file: No such file or directory",
        "ImportError: libmlx.so: cannot open shared object file: No such file or directory",
    ),
    "linux loader": ("missing_library", _LOADER, _LOADER),
    "macos loader": (
        "missing_library",
        "dyld[812]: Library not loaded: @rpath/libmlx.dylib\n  Referenced from: <1A2B> /opt/runner/server\n"
        "  Reason: tried: '/opt/runner/libmlx.dylib' (no such file)",
        "dyld[812]: Library not loaded: @rpath/libmlx.dylib",
    ),
    "python, file": (
        "missing_file",
        f"{_TRACE}FileNotFoundError: [Errno 2] No such file or directory: '/models/none/config.json'",
        "FileNotFoundError: [Errno 2] No such file or directory: '/models/none/config.json'",
    ),
    "llama.cpp, file": (
        "missing_file",
        "gguf_init_from_file: failed to open GGUF file 'none.gguf'\n"
        "llama_model_load: error loading model: llama_model_loader: failed to load model from none.gguf\n"
        "main: exiting due to model loading error",
        "gguf_init_from_file: failed to open GGUF file 'none.gguf'",
    ),
    "shell, script": (
        "missing_file",
        "/usr/bin/env: 'python3.14': No such file or directory",
        "/usr/bin/env: 'python3.14': No such file or directory",
    ),
    "python, port": (
        "port_in_use",
        f"{_TRACE}OSError: [Errno 98] Address already in use",
        "OSError: [Errno 98] Address already in use",
    ),
    "uvicorn, port": (
        "port_in_use",
        "INFO:     Started server process [812]\n"
        "ERROR:    [Errno 48] error while attempting to bind on address ('127.0.0.1', 8000): address already in use\n"
        "INFO:     Waiting for application shutdown.",
        "ERROR:    [Errno 48] error while attempting to bind on address ('127.0.0.1', 8000): address already in use",
    ),
    "llama-server, port": (
        "port_in_use",
        "main: couldn't bind HTTP server socket, hostname: 127.0.0.1, port: 8080\n"
        "srv    operator(): operator(): cleaning up before exit...\n"
        "main: exiting due to HTTP server error",
        "main: couldn't bind HTTP server socket, hostname: 127.0.0.1, port: 8080",
    ),
    "go, port": (
        "port_in_use",
        "Error: listen tcp 127.0.0.1:11434: bind: address already in use",
        "Error: listen tcp 127.0.0.1:11434: bind: address already in use",
    ),
    "node, port": (
        "port_in_use",
        "Error: listen EADDRINUSE: address already in use 127.0.0.1:3000\n    at Server.setupListenHandle (node:net:1)",
        "Error: listen EADDRINUSE: address already in use 127.0.0.1:3000",
    ),
    "metal, timeout": ("gpu_timeout", f"{_MLX_TIMEOUT}\nAbort trap: 6", _MLX_TIMEOUT),
    "c++, terminate": (
        "panic",
        "terminate called after throwing an instance of 'std::runtime_error'\n  what():  [load_safetensors] bad header\n"
        "Aborted (core dumped)",
        "what():  [load_safetensors] bad header",
    ),
    "c++, macos": (
        "panic",
        "libc++abi: terminating due to uncaught exception of type std::out_of_range: map::at\nAbort trap: 6",
        "libc++abi: terminating due to uncaught exception of type std::out_of_range: map::at",
    ),
    "rust": (
        "panic",
        "thread 'main' panicked at src/main.rs:4:5:\nindex out of bounds: the len is 3 but the index is 7\n"
        "note: run with `RUST_BACKTRACE=1` environment variable to display a backtrace",
        "thread 'main' panicked at src/main.rs:4:5:",
    ),
    "go, panic": (
        "panic",
        "panic: runtime error: invalid memory address or nil pointer dereference\n\ngoroutine 1 [running]:\nmain.main()",
        "panic: runtime error: invalid memory address or nil pointer dereference",
    ),
    "ggml": (
        "panic",
        "/build/ggml.c:4321: GGML_ASSERT(ggml_can_mul_mat(a, b)) failed\n[New LWP 812]",
        "/build/ggml.c:4321: GGML_ASSERT(ggml_can_mul_mat(a, b)) failed",
    ),
    "c, assert": (
        "panic",
        "server: load.c:12: main: Assertion `count > 0' failed.",
        "server: load.c:12: main: Assertion `count > 0' failed.",
    ),
    "python, segmentation fault": (
        "panic",
        'Fatal Python error: Segmentation fault\n\nCurrent thread 0x1 (most recent call first):\n  File "m.py", line 1',
        "Fatal Python error: Segmentation fault",
    ),
}

TRACEBACKS: dict[str, tuple[str, str]] = {
    "plain": (f"{_TRACE}ValueError: bad header", "ValueError: bad header"),
    "no message": (f"{_TRACE}KeyboardInterrupt", "KeyboardInterrupt"),
    "dotted name": (f"{_TRACE}safetensors_rust.SafetensorError: bad", "safetensors_rust.SafetensorError: bad"),
    "message of many lines": (
        f"{_TRACE}ValueError: these are missing:\n\tblocks.0.weight\n\tblocks.1.weight",
        "ValueError: these are missing:",
    ),
    "carets": (
        "Traceback (most recent call last):\n"
        '  File "server.py", line 12, in <module>\n'
        "    main(a, b.c)\n"
        "    ~~~~^^^^^^^^\n"
        "  [Previous line repeated 990 more times]\n"
        "RecursionError: maximum recursion depth exceeded",
        "RecursionError: maximum recursion depth exceeded",
    ),
    "thread": (f"Exception in thread Thread-1 (run):\n{_TRACE}KeyError: 'weight_map'", "KeyError: 'weight_map'"),
    "syntax": (
        'Traceback (most recent call last):\n  File "server.py", line 1, in <module>\n    import model\n'
        '  File "model.py", line 3\n    def f(:\n          ^\nSyntaxError: invalid syntax',
        "SyntaxError: invalid syntax",
    ),
    "group": (
        "  + Exception Group Traceback (most recent call last):\n"
        '  |   File "server.py", line 12, in <module>\n'
        "  |     asyncio.run(main())\n"
        "  | ExceptionGroup: unhandled errors in a TaskGroup (1 sub-exception)\n"
        "  +-+---------------- 1 ----------------\n"
        "    | Traceback (most recent call last):\n"
        '    |   File "server.py", line 4, in load\n'
        '    |     raise ValueError("bad header")\n'
        "    | ValueError: bad header\n"
        "    +------------------------------------",
        "ValueError: bad header",
    ),
}

_AGAIN = "\nDuring handling of the above exception, another exception occurred:\n\n"
_THEREFORE = "\nThe above exception was the direct cause of the following exception:\n\n"

CHAINED: dict[str, tuple[Cause, str, str]] = {
    "the last": ("traceback", f"{_TRACE}KeyError: 'a'\n{_AGAIN}{_TRACE}ValueError: no a", "ValueError: no a"),
    "cause": ("traceback", f"{_TRACE}KeyError: 'a'\n{_THEREFORE}{_TRACE}ValueError: no a", "ValueError: no a"),
    "the root is graver": (
        "missing_library",
        f"{_TRACE}ModuleNotFoundError: No module named 'mlx'\n{_AGAIN}{_TRACE}RuntimeError: no backend",
        "ModuleNotFoundError: No module named 'mlx'",
    ),
    "the last is graver": (
        "missing_file",
        f"{_TRACE}KeyError: 'a'\n{_AGAIN}{_TRACE}FileNotFoundError: [Errno 2] No such file or directory: 'a'",
        "FileNotFoundError: [Errno 2] No such file or directory: 'a'",
    ),
    "three": (
        "traceback",
        f"{_TRACE}KeyError: 'a'\n{_AGAIN}{_TRACE}ValueError: b\n{_THEREFORE}{_TRACE}RuntimeError: c",
        "RuntimeError: c",
    ),
}

NOISE = (
    "Aborted (core dumped)",
    "INFO:     Finished server process [812]\nINFO:     Shutting down",
    "/usr/lib/python3.11/multiprocessing/resource_tracker.py:254: UserWarning: resource_tracker: There appear to be 1 "
    "leaked semaphore objects to clean up at shutdown\n  warnings.warn('resource_tracker: There appear to be %d '",
    "\n\n   ",
    "srv    operator(): cleaning up before exit...",
)
