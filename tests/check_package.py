"""Builds the sdist, from it the wheel, installs that in a clean environment, and uses it there."""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = {f"kernels/cpu/{p.name}" for p in (ROOT / "kernels" / "cpu").iterdir()}
KERNELS = {f"chunked_ce/kernels/{p.name}" for p in (ROOT / "kernels").glob("*.py")}
USE = """
import torch, chunked_ce, chunked_ce.huggingface, pathlib
x = torch.randn(5, 77, requires_grad=True)
chunked_ce.cross_entropy(x, torch.tensor([1, 2, -100, 4, 76])).backward()
assert x.grad.isfinite().all() and (x.grad[2] == 0).all()
folder = pathlib.Path(chunked_ce.__file__).parent
assert "site-packages" in str(folder), folder
assert (folder / "py.typed").exists() and not (folder / "kernels").is_symlink()
assert chunked_ce.backends.cpu_library.IS_AVAILABLE == EXPECTED, "the CPU kernels in C"
print("installed:", chunked_ce.__version__, sorted(p.name for p in (folder / "kernels").glob("*.py")))
"""


def run(*command: object) -> None:
    subprocess.run([str(part) for part in command], check=True)


def use(package: Path, folder: Path, *, cpu_kernels: bool) -> None:
    """Installs `package` in a clean environment without a compiler, and uses it there."""
    # torch is borrowed from this environment: only what the package carries is under test
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    environment = {**os.environ, "PATH": str(folder / "bin"), "CC": "no-compiler"}
    environment.pop("PYTHONPATH", None)
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", package]
    subprocess.run(list(map(str, install)), check=True, env=environment)
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "borrowed.pth").write_text(
        f"{Path(sys.prefix).glob('lib/python*/site-packages').__next__()}\n"
    )
    code = USE.replace("EXPECTED", str(cpu_kernels))
    subprocess.run([str(python), "-c", code], check=True, cwd=folder, env=environment)
    sizes = ["--vocab", "50257", "--hidden", "768"]
    command = [str(folder / "bin" / "chunked-ce"), "plan", *sizes]
    subprocess.run(command, check=True, cwd=folder, env=environment)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(sys.executable, "-m", "build", "--outdir", folder, ROOT)
        (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
        with tarfile.open(sdist) as archive:
            files = {m.name.split("/", 1)[1]: m for m in archive.getmembers() if "/" in m.name}
        given = KERNELS | SOURCES
        assert KERNELS and all(files[k].isfile() for k in given), "the sdist lacks kernels"
        contents = set(zipfile.ZipFile(wheel).namelist())
        assert contents >= KERNELS | {"chunked_ce/py.typed"}, "the wheel lacks kernels"
        assert not any(n.startswith("kernels/") for n in contents), "a top-level kernels package"
        has_compiler = shutil.which("cc") is not None
        if has_compiler:
            assert any(n.startswith("chunked_ce/backends/cpu_") for n in contents), (
                "no CPU kernels in C"
            )
            assert wheel.name.split("-")[2:4] == ["py3", "none"], wheel.name
        # What was built runs where there is no compiler; and there the sdist is installed as well.
        use(wheel, folder / "clean", cpu_kernels=has_compiler)
        use(sdist, folder / "without_compiler", cpu_kernels=False)


main()
