"""Builds `lambda_kernels/_C.abi3.so` from csrc/. All else that describes the package stands in pyproject.toml.

What is built depends on what is there, and one line says which:

    C++ compiler and CUDA toolkit   CPU and CUDA code in one library, which a CPU-only PyTorch can load too
    C++ compiler only               CPU code
    neither                         no library; the operators run as plain PyTorch

Environment variables:

    LAMBDA_KERNELS_CUDA     1: fail unless the CUDA code can be built; 0: leave it out. Unset: see above.
    CUDA_HOME               the toolkit, if `nvcc` on the PATH is not to be asked.
    TORCH_CUDA_ARCH_LIST    the GPU architectures, as PyTorch spells them; the default is 8.0;8.6;8.9;9.0+PTX.
    MAX_JOBS                how many files are compiled at once.
    CXX                     the C++ compiler.

Only the stable ABI of libtorch and of Python is used, so one library serves every Python from 3.10 and every PyTorch
from 2.11 on, whichever it was built with.
"""

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

from setuptools import setup

DEFAULT_ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0")
CONVENTIONAL_PREFIX = Path("/usr/local")
STABLE_TORCH_ABI = "0x020b000000000000"  # 2.11
# Commands that compile. The others (metadata, source archives) must not wait for `import torch`.
COMPILING = {"build", "build_ext", "bdist_wheel", "editable_wheel", "develop", "install"}


class BuildError(Exception):
    """The build that was asked for is not possible here; the message says why and what to do."""


class Toolkit(NamedTuple):
    """A CUDA toolkit that has all that the build needs."""

    home: Path
    include: Path
    cudart_static: Path
    version: str  # such as "13.0"


class Plan(NamedTuple):
    """What to build, and the line that says so."""

    cpp: bool
    toolkit: Toolkit | None
    message: str


def output_of(*command):
    """Returns what a command prints, or an empty text if it cannot be run."""
    try:
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def inspect_toolkit(home):
    """Returns the `Toolkit` at a prefix, or a text that says what is missing there."""
    home = Path(home)
    machine = platform.machine()
    targets = [home, home / f"targets/{machine}-linux"]
    if machine == "aarch64":
        targets.append(home / "targets/sbsa-linux")
    include = next((t / "include" for t in targets if (t / "include/cuda_runtime.h").is_file()), None)
    libraries = [t / lib / "libcudart_static.a" for t in targets for lib in ("lib64", "lib")]
    cudart_static = next((path for path in libraries if path.is_file()), None)
    nvcc = home / "bin" / "nvcc"
    missing = [
        name
        for name, found in (
            ("bin/nvcc", nvcc.is_file()),
            ("include/cuda_runtime.h", include),
            ("lib64/libcudart_static.a", cudart_static),
        )
        if not found
    ]
    if missing:
        return f"{home} has no {', no '.join(missing)}"
    release = re.search(r"release (\d+\.\d+)", output_of(str(nvcc), "--version"))
    if release is None:
        return f"{nvcc} --version names no release"
    return Toolkit(home, include, cudart_static, release[1])


def toolkit_candidates(environ, conventional_prefix=CONVENTIONAL_PREFIX):
    """Yields the prefixes where a toolkit may be, best first."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if environ.get(variable):
            yield Path(environ[variable])
    nvcc = shutil.which("nvcc", path=environ.get("PATH", os.defpath))
    if nvcc:
        # The file on the PATH may be a script or a link in another prefix; only nvcc itself knows where it lives.
        top = re.search(r"^#\$ TOP=(.+)$", output_of(nvcc, "--dryrun", "-x", "cu", os.devnull), re.MULTILINE)
        if top:
            yield Path(top[1].strip())

    def release(path):
        return [int(number) for number in re.findall(r"\d+", path.name)]

    yield conventional_prefix / "cuda"
    yield from sorted(conventional_prefix.glob("cuda-*"), key=release, reverse=True)


def find_toolkit(environ, conventional_prefix=CONVENTIONAL_PREFIX):
    """Returns the first usable `Toolkit`, or a text that says where none was found."""
    rejected = []
    for home in dict.fromkeys(home.resolve() for home in toolkit_candidates(environ, conventional_prefix)):
        found = inspect_toolkit(home)
        if isinstance(found, Toolkit):
            return found
        if home.exists():
            rejected.append(found)
    return "no CUDA toolkit found" + "".join(f"; {reason}" for reason in rejected)


def cuda_switch(environ):
    """Returns what LAMBDA_KERNELS_CUDA asks for: True, False or, if it is unset, None."""
    value = environ.get("LAMBDA_KERNELS_CUDA", "")
    try:
        return {"": None, "0": False, "1": True}[value]
    except KeyError:
        raise BuildError(f"LAMBDA_KERNELS_CUDA must be 0 or 1 or unset, got {value!r}") from None


def cuda_obstacle(toolkit, torch_version, torch_cuda):
    """Returns why CUDA code cannot be built for this PyTorch, or None.

    Args:
        toolkit: What `find_toolkit` returned.
        torch_version: `torch.__version__`.
        torch_cuda: `torch.version.cuda`, None for a PyTorch without CUDA.
    """
    if not isinstance(toolkit, Toolkit):
        return toolkit
    if torch_cuda is None:
        return f"PyTorch {torch_version} is built without CUDA"
    if toolkit.version.split(".")[0] != torch_cuda.split(".")[0]:
        return (
            f"the toolkit at {toolkit.home} is CUDA {toolkit.version}, PyTorch {torch_version} is built for CUDA "
            f"{torch_cuda}, and their major versions must agree (CUDA_HOME chooses another toolkit)"
        )
    return None


def find_compiler(environ):
    """Returns the C++ compiler, or None if there is none.

    Raises:
        BuildError: CXX names a compiler that does not exist.
    """
    path = environ.get("PATH", os.defpath)
    if environ.get("CXX"):
        # CXX may hold a wrapper and flags, as in "ccache g++".
        if shutil.which(environ["CXX"].split()[0], path=path) is None:
            raise BuildError(f"CXX names {environ['CXX']!r}, which is not on the PATH")
        return environ["CXX"]
    if sys.platform == "win32":
        vswhere = Path(environ.get("ProgramFiles(x86)", "")) / "Microsoft Visual Studio/Installer/vswhere.exe"
        tools = ("-products", "*", "-requires", "Microsoft.VisualStudio.Component.VC.Tools.x86.x64")
        found = shutil.which("cl", path=path) or output_of(str(vswhere), "-latest", *tools, "-property", "productId")
        return "cl" if found.strip() else None
    if sys.platform == "darwin" and not output_of("xcode-select", "-p").startswith("/"):
        return None  # without the command-line tools, c++ is there but only asks to install them
    return next((name for name in ("c++", "g++", "clang++") if shutil.which(name, path=path)), None)


def headers_are_there():
    """Whether C code can include Python.h; Linux distributions ship it apart from Python itself."""
    return any((Path(sysconfig.get_path(name)) / "Python.h").is_file() for name in ("include", "platinclude"))


def make_plan(environ, compiler, toolkit, torch_version, torch_cuda, headers=True):
    """Decides what to build.

    Raises:
        BuildError: LAMBDA_KERNELS_CUDA=1, and the CUDA code cannot be built.
    """
    switch = cuda_switch(environ)
    missing = None
    if compiler is None:
        missing = "no C++ compiler found"
    elif not headers:
        missing = "Python.h not found (on Debian and Ubuntu it comes with python3-dev)"
    obstacle = missing or cuda_obstacle(toolkit, torch_version, torch_cuda)
    if switch and obstacle:
        raise BuildError(
            f"LAMBDA_KERNELS_CUDA=1, but {obstacle}. LAMBDA_KERNELS_CUDA=0 (or unset) installs without CUDA code."
        )
    if missing:
        return Plan(False, None, f"{missing}: no extension is built, the operators run as plain PyTorch")
    if switch is False:
        return Plan(True, None, "building CPU code only: LAMBDA_KERNELS_CUDA=0")
    if obstacle:
        return Plan(True, None, f"building CPU code only: {obstacle}")
    return Plan(True, toolkit, f"building CPU and CUDA code with CUDA {toolkit.version} from {toolkit.home}")


def architecture_list(environ, supported):
    """Returns the value for TORCH_CUDA_ARCH_LIST.

    The user's own list is taken as it is. Without one, PyTorch's builder would look at the GPUs of this machine and
    fail where there is none.

    Args:
        environ: The environment.
        supported: Architectures that nvcc knows, such as ["7.5", "8.0"]; empty if it does not tell.
    """
    if environ.get("TORCH_CUDA_ARCH_LIST"):
        return environ["TORCH_CUDA_ARCH_LIST"]
    chosen = [arch for arch in DEFAULT_ARCHITECTURES if not supported or arch in supported]
    # A toolkit that has dropped all of them builds for the oldest that it knows, whose PTX runs on all the newer ones.
    return ";".join(chosen or supported[:1]) + "+PTX"


def supported_architectures(nvcc):
    """Returns the architectures that an nvcc can compile for, oldest first."""
    numbers = set(re.findall(r"compute_(\d+)\b", output_of(str(nvcc), "--list-gpu-arch")))
    return [f"{number[:-1]}.{number[-1]}" for number in sorted(numbers, key=int)]


def sources_digest(root="."):
    """Returns a digest of all that the extension is made of in a source tree: csrc/ and this file."""
    digest = hashlib.sha256()
    for path in (Path(root, "setup.py"), *sorted(Path(root, "csrc").iterdir())):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def extension_of(plan, architectures, torch_version, limited_api=True):
    """Describes the extension to setuptools."""
    import torch
    from torch.utils.cpp_extension import CppExtension

    sources = ["csrc/registration.cpp", "csrc/histogram.cpp", "csrc/histogram_cpu.cpp"]
    sources += [f"csrc/cpu_{part}.cpp" for part in ("lanes", "avx512", "avx2", "plain")]
    defines = [f"-DTORCH_TARGET_VERSION={STABLE_TORCH_ABI}"]
    facts = [  # what build_info() tells; PyTorch's builder itself adds Py_LIMITED_API
        f"-DLAMBDA_KERNELS_CUDA={plan.toolkit.version if plan.toolkit else 'none'}",
        f"-DLAMBDA_KERNELS_CUDA_ARCHITECTURES={architectures or 'none'}",
        f"-DLAMBDA_KERNELS_TORCH={torch_version}",
        f"-DLAMBDA_KERNELS_SOURCES={sources_digest()}",
    ]
    # The bin rule is the same on every machine only if no compiler fuses or reorders its operations.
    cxx, shortened = ["/O2", "/fp:precise"], []
    if sys.platform != "win32":
        # No code here looks at floating-point exception flags; assuming that some does would keep loops from being vectorized.
        cxx = ["-O3", "-fvisibility=hidden", "-ffp-contract=off", "-fno-trapping-math"]
        # No paths of this machine in the library: neither debug information nor the file names in messages.
        shortened = [f"-ffile-prefix-map={root}/=" for root in (Path.cwd(), Path(torch.__file__).parents[1])]
        cxx += ["-g0", *shortened]
    nvcc = ["-O3", "-fmad=false", "-Xcompiler=-fvisibility=hidden,-ffp-contract=off"]
    nvcc += [f"-Xcompiler={flag}" for flag in shortened]
    cuda = {}
    if plan.toolkit:
        sources.append("csrc/histogram_cuda.cu")
        # Neither libcudart.so nor libtorch_cuda.so: with them, a CPU-only PyTorch could not load the library.
        cuda = {
            "include_dirs": [str(plan.toolkit.include)],
            "extra_objects": [str(plan.toolkit.cudart_static)],
            "extra_link_args": ["-ldl", "-lrt", "-lpthread"],
        }
    return CppExtension(
        "lambda_kernels._C",
        sources,
        depends=[str(header) for header in sorted(Path("csrc").glob("*.h"))],
        py_limited_api=limited_api,
        extra_compile_args={"cxx": [*cxx, *defines, *facts], "nvcc": [*nvcc, *defines]},
        **cuda,
    )


def setup_arguments(environ):
    """Returns the arguments of `setup()` that build the extension, none if nothing can be built."""
    compiler = find_compiler(environ)
    cuda_switch(environ)  # a wrong value is reported before the seconds that importing torch takes
    toolkit = find_toolkit(environ)
    if isinstance(toolkit, Toolkit):
        environ["CUDA_HOME"] = str(toolkit.home)  # PyTorch guesses its own when it is imported
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        raise BuildError(
            "PyTorch must be there to build the extension: install torch first, or drop --no-build-isolation"
        ) from error
    plan = make_plan(environ, compiler, toolkit, torch.__version__, torch.version.cuda, headers_are_there())
    print(f"lambda-kernels: {plan.message}", file=sys.stderr, flush=True)
    if not plan.cpp:
        return {}
    if sys.platform != "win32":
        environ["CXX"] = compiler  # PyTorch's builder would otherwise try c++ alone
    architectures = None
    if plan.toolkit:
        architectures = architecture_list(environ, supported_architectures(plan.toolkit.home / "bin" / "nvcc"))
        environ["TORCH_CUDA_ARCH_LIST"] = architectures
        architectures = architectures.replace(" ", ";")
    limited_api = not sysconfig.get_config_var("Py_GIL_DISABLED")  # a free-threaded Python has no limited API
    return {
        "ext_modules": [extension_of(plan, architectures, torch.__version__, limited_api)],
        "cmdclass": {"build_ext": cpp_extension.BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}} if limited_api else {},
    }


if __name__ == "__main__":
    try:
        arguments = setup_arguments(os.environ) if COMPILING.intersection(sys.argv[1:]) else {}
    except BuildError as error:
        sys.exit(f"lambda-kernels: {error}")
    setup(**arguments)
