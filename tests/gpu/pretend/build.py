"""Build the pretended card for the torch of this Python, once: it is kept in a cache folder.

It needs g++, and a CUDA build of torch with the wheels that it brings: they have the headers.
"""

import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.gpu.pretend import generate

HERE = Path(__file__).parent
SOURCES = HERE / "sources"
LIBRARY = "libcuda.so.1"
"""The name that Triton and PyTorch load the driver by. Others are preloaded and found by symbol, so
that one file can be all of them; but for NVRTC, which is loaded by name too."""
COMPILER = "libnvrtc.so.*[0-9]"
TOOLKITS = (Path("/usr/local/cuda"), Path("/usr/local"), Path("/usr/include"))
HEADERS = ("cuda_runtime_api.h", "cudnn_graph.h")
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-Wall")


def site():
    """Return the folder of installed packages that torch is in; None without torch."""
    found = importlib.util.find_spec("torch")
    return None if found is None else Path(found.origin).parents[1]


def folder_of(header):
    """Return the folder of a header, of torch's wheels or of a toolkit; None without one."""
    for root in (site() / "nvidia", *TOOLKITS):
        for path in sorted(root.rglob(header)) if root.is_dir() else ():
            return path.parent
    return None


def missing():
    """Return why the card cannot be built here, in words; "" if it can."""
    if not sys.platform.startswith("linux"):
        return "the pretended card is for Linux"
    if site() is None or not (site() / "torch/lib/libtorch_cuda.so").is_file():
        return "torch here is no CUDA build: pip install torch, without the index for CPUs"
    for tool in ("g++", "nm"):
        if shutil.which(tool) is None:
            return f"no {tool} here"
    for header in HEADERS:
        if folder_of(header) is None:
            return f"no {header} here: torch's CUDA wheels have it"
    return ""


def key():
    """Return what the library depends on, as a name: torch, and each file that makes it."""
    found = hashlib.blake2b(importlib.metadata.version("torch").encode(), digest_size=8)
    for path in sorted([*SOURCES.rglob("*.*"), *HERE.glob("*.py")]):
        if path.is_file():
            found.update(path.read_bytes())
    return found.hexdigest()


def symbols(files, *, defined):
    """Return the names that libraries or objects define, or that they lack."""
    kind = ["--defined-only"] if defined else ["-D", "--undefined-only"]
    said = subprocess.run(["nm", *kind, *files], capture_output=True, text=True, check=True)
    return {line.split()[-1].split("@")[0] for line in said.stdout.splitlines() if " " in line}


def compiled(source, work):
    """Compile one source file; return its object."""
    made = work / f"{source.stem}.o"
    include = [f"-I{SOURCES}", *(f"-I{folder_of(header)}" for header in HEADERS)]
    shim = f"-idirafter{SOURCES}"  # crt/host_defines.h, where no toolkit has it
    subprocess.run(["g++", *FLAGS, *include, shim, "-c", source, "-o", made], check=True)
    return made


def link(objects, library):
    """Write a library of objects."""
    options = ["-shared", f"-Wl,-soname,{library.name}", "-o", library]
    subprocess.run(["g++", *objects, *options], check=True)


def build_in(work):
    """Write the library into an empty folder."""
    objects = [compiled(path, work) for path in sorted(SOURCES.glob("*.cpp"))]
    needed = generate.wanted(symbols(sorted((site() / "torch/lib").glob("*.so")), defined=False))
    written = symbols(objects, defined=True)
    rest = work / "rest.cpp"
    rest.write_text(generate.source([name for name in needed if name not in written]))
    objects.append(compiled(rest, work))
    compiler = work / "nvrtc.o"
    link([made for made in objects if made != compiler], work / LIBRARY)
    for name in {path.name for path in (site() / "nvidia").rglob(COMPILER)}:
        link([compiler], work / name)
    (work / "libcuda.so").symlink_to(LIBRARY)
    for left in (rest, *objects):
        left.unlink()


def build():
    """Return the folder of the library, which is built if no earlier call has done it."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "cmtool-pretended-card" / key()
    if not (folder / LIBRARY).is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=folder.parent))
        build_in(work)
        try:
            work.rename(folder)
        except OSError:  # another process was faster
            shutil.rmtree(work)
    return folder


def environment(folder):
    """Return the variables under which a process has the card."""
    return {
        "LD_PRELOAD": ":".join(map(str, sorted(folder.glob("*.so.*")))),
        "TRITON_LIBCUDA_PATH": str(folder),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
