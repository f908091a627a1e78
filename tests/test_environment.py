"""The environment that env_setup.sh makes."""

import os
import subprocess
import sys
import sysconfig

from conftest import ROOT, TIME_LIMIT


def test_every_python_of_the_environment_can_import_diffusers_alone(tmp_path):
    """The registry's torchvision, a CUDA build, beside a CPU-only torch: the line that env_setup.sh adds repairs it."""
    (line,) = (text.strip() for text in (ROOT / "env_setup.sh").read_text().splitlines() if "find_spec" in text)
    hook = line.removeprefix("echo '").partition("' >")[0]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True, timeout=TIME_LIMIT)
    python = tmp_path / "env/bin/python"
    (folder,) = (tmp_path / "env/lib").glob("python3*/site-packages")
    (folder / "a.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n{ROOT}\n")
    (folder / "torchvision_repair.pth").write_text(hook)
    code = "import sys; assert 'torch' not in sys.modules; from diffusers import FluxPipeline; import torchvision.ops"
    done = subprocess.run([python, "-c", code], env=clean, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (folder / "a.pth").unlink()  # without the package the line does nothing
    done = subprocess.run([python, "-c", "pass"], env=clean, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr
