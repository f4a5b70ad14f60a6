"""Code in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import cmx_kernels

PACKAGE = Path(cmx_kernels.__file__).parent


def python(code: str, package: Path = PACKAGE, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh process that imports this package and has none of our variables set but these."""
    found_first = f"sys.path.insert(0, {str(package.parent)!r})"
    # an editable install would lend its library to a copy that has none
    found_only = "sys.meta_path = [f for f in sys.meta_path if '__editable__' not in getattr(f, '__module__', '')]"
    command = [sys.executable, "-W", "default", "-c", f"import sys; {found_first}; {found_only}; {code}"]
    kept = {k: v for k, v in os.environ.items() if not k.startswith("CMX_")}
    return subprocess.run(command, env={**kept, **environment}, capture_output=True, text=True, timeout=120)
