"""What is installed, what works, and the command that mends what does not: ``python -m disalign.doctor [PART ...]``.

Only the standard library is imported here: the doctor starts where torch or numpy do not.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlparse

from .libraries import (
    FRAMEWORKS,
    HEADLESS,
    HERE,
    NOT_CHECKED,
    NOT_INSTALLED,
    NOT_TRIED,
    OPENCV,
    OPENMMLAB,
    PARTS,
    PIP,
    PYTHON,
    install,
    installed,
    is_there,
    maintained,
    mend_of,
    own_install,
    reinstall,
    requirements,
    same_build,
    shadow,
    version_of,
)
from .probes import try_all

OK, NOTE, PROBLEM, ABSENT = "ok", "note", "problem", "absent"


class Check(NamedTuple):
    """One line of the report; ``mend`` is a shell command."""

    part: str
    name: str
    state: str
    detail: str
    mend: str | None = None


def examine(asked=(), timeout: float = 120) -> list:
    """The report, one :class:`Check` a line; it raises nothing.

    Args:
        asked: parts that must work, beside the core. None: every part whose framework is installed.
        timeout: seconds that one import may take.
    """
    there = [part for part, names in FRAMEWORKS.items() if not missing(part, names)]
    parts = ["core", *(part for part in FRAMEWORKS if part in (asked or there))]
    libraries = {library.name: library for part in parts for library in PARTS[part]}
    outcomes = try_all(list(libraries.values()), timeout)
    checks, said = [], set()
    for part in parts:
        looks = [(name, look, ()) for name, look in CONFLICTS.get(part, ())]
        looks += [(each.name, look_at, (each, outcomes[each.name])) for each in PARTS[part]]
        for name, look, arguments in looks:
            # What several parts need is said once, where it is needed first.
            if (name, look) not in said:
                checks += guarded(part, name, look, *arguments)
            said.add((name, look))
    for part in FRAMEWORKS:
        if part not in parts and not asked:
            lacking = missing(part)
            detail = f"{NOT_INSTALLED}: {', '.join(library.name for library in lacking)}"
            checks.append(Check(part, part, ABSENT, detail, install(lacking)))
    return checks


def missing(part: str, names=()) -> list:
    """The libraries of a part that are not there, of all or of those named."""
    return [each for each in PARTS[part] if (not names or each.name in names) and not is_there(each)]


def guarded(part: str, name: str, look, *arguments) -> list:
    """The line of one check; a fault in the check is a line as well."""
    try:
        found = look(*arguments)
    except Exception as error:
        found = PROBLEM, f"{NOT_CHECKED}: {type(error).__name__}: {error}"
    return [Check(part, name, *found)] if found else []


# The checks: each gives state, detail and, perhaps, what mends it; or None where there is nothing to say.


def look_at(library, outcome) -> tuple | None:
    """A library: there, working, and of a version that we ask for."""
    if outcome.error.startswith(NOT_TRIED) and (library.module or library.lost):
        return None
    if library.name == "GPU" and not outcome.error:
        return gpus(**outcome.value)
    name = installed(library)
    version = version_of(name) if name else None
    wanted = requirements().get(name, "")
    folder = shadow(library)
    fits = folder or not version or satisfies(version, wanted)
    upgrade = None if fits else install([library._replace(distributions=(name,))])
    shown = " ".join(filter(None, [version or outcome.value, name and name != library.name and f"({name})"]))
    if folder and name:
        shown = f"{outcome.value or ''} taken from {folder}, not the installed {shown}".strip()
        shown += f" (remove that folder from PYTHONPATH, or rename {library.name} there)"
    if outcome.error:
        # Without colours, and short: some errors are pages.
        error = re.sub(r"\x1b\[[0-9;]*m", "", outcome.error)[: 100 if library.lost else 200]
        detail = "; ".join(filter(None, [library.lost, error]))
        # What pip installs stays in the shadow.
        mend = None if folder else upgrade or mend_of(library, outcome.error)
        if mend == same_build():
            detail += same_index()
        return NOTE if library.lost else PROBLEM, ": ".join(filter(None, [shown, detail])), mend
    if upgrade:
        return PROBLEM, f"{shown}: expected {wanted}", upgrade
    if folder and name:
        return NOTE, shown
    if version == "":
        return NOTE, ": ".join(filter(None, [shown, "its metadata names no version"])), reinstall(library)
    return OK, shown or "works"


def same_index() -> str:
    build = (version_of("torch") or "").partition("+")[2]
    return f"; torch is a +{build} build and needs torchvision from the index that it came from" if build else ""


def satisfies(version: str, wanted: str) -> bool:
    """Whether a version is one that a requirement asks for; so taken where ``packaging`` is not there to tell."""
    try:
        from packaging.specifiers import SpecifierSet
    except Exception:
        return True
    return SpecifierSet(wanted).contains(version, prereleases=True)


def gpus(build, names, said) -> tuple:
    if names:
        return OK, f"{', '.join(names)} (torch for CUDA {build})"
    warnings = [line for line in said if re.search("CUDA|NVIDIA|driver", line)]
    if warnings:
        return NOTE, f"none that torch can use, everything runs on the CPU: {warnings[0].splitlines()[0][:200]}"
    if shutil.which("nvidia-smi"):
        kind = f"for CUDA {build}" if build else "for CPUs"
        return NOTE, f"none that torch ({kind}) can use, though there is nvidia-smi"
    return OK, "none that torch can use: everything runs on the CPU"


def python() -> tuple:
    if sys.version_info < (3, 11):  # noqa: UP036 (the doctor starts on older ones, to say so)
        return PROBLEM, f"{sys.version.split()[0]}: expected 3.11 or later; make a virtual environment with one"
    return OK, sys.version.split()[0]


def pip() -> tuple | None:
    if find_spec("pip"):
        return None
    mend = f"{PYTHON} -m ensurepip" if find_spec("ensurepip") else None
    return NOTE, "not there, though commands that mend need it", mend


def installation() -> tuple:
    """Which disalign this is, and whether it is the one that is installed."""
    found = []
    for each in metadata.distributions(name="disalign"):
        direct = json.loads(each.read_text("direct_url.json") or "{}")
        folder = Path(each.locate_file("")).resolve()
        if direct.get("dir_info", {}).get("editable"):
            from urllib.request import url2pathname  # with much behind it that may be broken

            folder = Path(url2pathname(urlparse(direct["url"]).path)).resolve()
        elif folder == HERE and own_install():
            continue  # a checkout's egg-info: built here, not installed
        found.append((folder, each.version))
    if not found:
        return NOTE, f"{NOT_INSTALLED}, taken from {HERE}", own_install()
    folder, version = found[0]
    if folder != HERE:
        return NOTE, f"{version} is installed from {folder}, but taken from {HERE}", own_install()
    return OK, f"{version} from {folder}"


def packaging() -> tuple | None:
    if "torch" not in requirements():
        return NOTE, "what disalign asks for is not known, since it is not installed", own_install()
    try:
        import packaging.specifiers  # noqa: F401
    except Exception:
        return NOTE, "not compared with what disalign asks for: no packaging", f"{PIP} install packaging"
    return None


def openmmlab() -> tuple | None:
    """Both distributions write the same files; what is left is a mixture."""
    pairs = [
        f"{name} and {other}"
        for name, others in OPENMMLAB.items()
        for other in others
        if version_of(name) is not None and version_of(other) is not None
    ]
    if pairs:
        return PROBLEM, f"{', '.join(pairs)} are both installed and overwrite each other's files", maintained()
    return None


def opencv() -> tuple | None:
    there = {name: version_of(name) for name in OPENCV if version_of(name) is not None}
    if len(set(there.values())) > 1:
        versions = " and ".join(f"{name} {version}" for name, version in there.items())
        return NOTE, f"{versions} overwrite each other's files", HEADLESS
    return None


def torch_of_torchvision() -> tuple | None:
    """Torchvision names the torch that it was built for."""
    version = version_of("torch")
    if not version or version_of("torchvision") is None:
        return None
    for line in metadata.requires("torchvision") or ():
        match = re.match(r"torch\s*\(?([^;)]*)\)?\s*$", line)
        if match and not satisfies(version, match[1].strip()):
            return NOTE, f"{version}, but torchvision asks for {match[1].strip()}{same_index()}", same_build()
    return None


def float_of_numpy() -> tuple | None:
    """lvis 0.5.3 uses ``np.float``, which numpy 1.24 removed; we evaluate with faster-coco-eval."""
    spec = find_spec("lvis")
    numpy = [int(number) for number in re.findall(r"\d+", version_of("numpy") or "")[:2]]
    if spec is None or not spec.submodule_search_locations or numpy < [1, 24]:
        return None
    path = Path(spec.submodule_search_locations[0], "eval.py")
    if not path.is_file() or not re.search(r"\bnp\.float\b", path.read_text(encoding="utf-8")):
        return None
    detail = (
        "Detectron2's LVISEvaluator fails, since lvis uses np.float, which numpy 1.24 removed; ours does not use it"
    )
    return NOTE, detail, f"sed -i 's/np\\.float)/float)/' {shlex.quote(str(path))}"


CONFLICTS = {
    "core": (("Python", python), ("pip", pip), ("installation", installation), ("versions", packaging)),
    "cls": (("OpenMMLab", openmmlab), ("OpenCV", opencv), ("torch", torch_of_torchvision)),
    "mmseg": (("OpenMMLab", openmmlab), ("OpenCV", opencv)),
    "d2": (("OpenCV", opencv), ("torch", torch_of_torchvision), ("lvis", float_of_numpy)),
}


def as_text(checks, works: bool) -> str:
    width = max(len(check.name) for check in checks)
    lines, part = [], None
    for check in checks:
        if check.part != part:
            part = check.part
            lines.append(part)
        lines.append(f"  {check.state:<8} {check.name:<{width}}  {check.detail}")
        if check.mend:
            lines.append(f"  {'':8} mend: {check.mend}")
    parts = dict.fromkeys(check.part for check in checks if check.state != ABSENT)
    broken = dict.fromkeys(check.part for check in checks if check.state == PROBLEM)
    lines += ["", f"works: {', '.join(parts)}" if works else f"does not work: {', '.join(broken)}"]
    return "\n".join(lines)


def as_json(checks, works: bool) -> str:
    names = {name for part in PARTS.values() for library in part for name in library.distributions} | {"disalign"}
    versions = {name: version_of(name) for name in sorted(names) if version_of(name) is not None}
    report = {"ok": works, "python": sys.version.split()[0], "versions": versions}
    return json.dumps({**report, "checks": [check._asdict() for check in checks]}, indent=2)


def write(text: str) -> None:
    """To stdout, in its encoding; where nobody reads on, or the disk is full, the exit status is the report."""
    encoding = getattr(sys.stdout, "encoding", None) or "ascii"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except OSError:
        # Python flushes once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m disalign.doctor", description=__doc__.split(":")[0] + ".")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"what must work: {', '.join(PARTS)}")
    parser.add_argument("--json", action="store_true", help="the report as JSON")
    parser.add_argument("--timeout", type=float, default=120, help="seconds that one import may take")
    arguments = parser.parse_args(argv)
    unknown = [part for part in arguments.parts if part not in PARTS]
    if unknown:
        parser.error(f"expected parts of {', '.join(PARTS)}, got {unknown[0]!r}")
    if not 0 < arguments.timeout <= 3600:
        parser.error(f"expected a timeout of 0 to 3600 seconds, got {arguments.timeout:g}")
    checks = examine(arguments.parts, arguments.timeout)
    works = all(check.state != PROBLEM for check in checks)
    write((as_json if arguments.json else as_text)(checks, works))
    return 0 if works else 1


if __name__ == "__main__":
    sys.exit(main())
