"""Builds the sdist, from it the wheel, installs that in a clean environment, and uses it there."""

import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
KERNELS = {f"chunked_ce/kernels/{p.name}" for p in (ROOT / "kernels").glob("*.py")}
USE = """
import torch, chunked_ce, chunked_ce.huggingface, pathlib
x = torch.randn(5, 77, requires_grad=True)
chunked_ce.cross_entropy(x, torch.tensor([1, 2, -100, 4, 76])).backward()
assert x.grad.isfinite().all() and (x.grad[2] == 0).all()
folder = pathlib.Path(chunked_ce.__file__).parent
assert "site-packages" in str(folder), folder
assert (folder / "py.typed").exists() and not (folder / "kernels").is_symlink()
print("installed:", chunked_ce.__version__, sorted(p.name for p in (folder / "kernels").glob("*.py")))
"""


def run(*command: object) -> None:
    subprocess.run([str(part) for part in command], check=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(sys.executable, "-m", "build", "--outdir", folder, ROOT)
        (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
        with tarfile.open(sdist) as archive:
            files = {m.name.split("/", 1)[1]: m for m in archive.getmembers() if "/" in m.name}
        assert KERNELS and all(files[k].isfile() for k in KERNELS), "the sdist lacks kernels"
        contents = set(zipfile.ZipFile(wheel).namelist())
        assert contents >= KERNELS | {"chunked_ce/py.typed"}, "the wheel lacks kernels"
        assert not any(n.startswith("kernels/") for n in contents), "a top-level kernels package"
        # torch is borrowed from this environment: only what the wheel carries is under test
        venv.create(folder / "clean", with_pip=True)
        python = folder / "clean" / "bin" / "python"
        run(python, "-m", "pip", "install", "--quiet", "--no-deps", wheel)
        site = next((folder / "clean").glob("lib/python*/site-packages"))
        (site / "borrowed.pth").write_text(
            f"{Path(sys.prefix).glob('lib/python*/site-packages').__next__()}\n"
        )
        subprocess.run([str(python), "-c", USE], check=True, cwd=folder)
        command = folder / "clean" / "bin" / "chunked-ce"
        sizes = ["--vocab", "50257", "--hidden", "768"]
        subprocess.run([str(command), "plan", *sizes], check=True, cwd=folder)


main()
