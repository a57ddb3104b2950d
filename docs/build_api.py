"""Builds the pages of the interface from the docstrings: python docs/build_api.py [DIRECTORY [MODULE ...]]

Needs pdoc (the extra "docs"). A warning is an error. The first page lists the modules in the order in which a
reader needs them.
"""

from __future__ import annotations

import html
import importlib
import inspect
import sys
import typing
import warnings
from pathlib import Path
from types import ModuleType

import pdoc
import pdoc.doc
import pdoc.render

ORDER = {
    "Protect and prove": {
        "honeytrace": "SecretKey, calibrate, Watermark, verify, Verdict, WatermarkRule, rehearse",
        "honeytrace.ownership": "the tests that a claim rests on",
        "honeytrace.ownership.commitment": "binding to a key before it is used",
        "honeytrace.ownership.evidence": "a bundle that somebody else can check",
        "honeytrace.ownership.journal": "a suspect that is asked nothing twice",
        "honeytrace.records": "results for trackers and data frames",
    },
    "Serve": {
        "honeytrace.serving": "HTTP, LitServe, Ray Serve",
        "honeytrace.numpy": "the watermark over NumPy arrays, without torch",
    },
    "Attack your own model": {
        "honeytrace.extraction": "attacks, from random queries to adaptive ones",
        "honeytrace.removal": "what is done to a copy to remove the mark",
        "honeytrace.baselines": "other watermarks",
        "honeytrace.evaluation": "every defence against every attack",
    },
    "Underneath": {
        "honeytrace.watermark": "keys, trigger groups, calibration, the file",
        "honeytrace.ops": "the operations and their backends",
        "honeytrace.training": "the training loop",
        "honeytrace.models": "small models",
        "honeytrace.data": "data sets",
        "honeytrace.doctor": "what was built, and what runs here",
    },
}

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Honeytrace {version}: the interface</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem; }}
h2 {{ margin: 1.6rem 0 0.3rem; font-size: 1.1rem; }}
dl {{ display: grid; grid-template-columns: minmax(12rem, auto) 1fr; gap: 0.25rem 1rem; margin: 0; }}
dd {{ margin: 0; opacity: 0.8; }}
code {{ font-size: 0.95em; }}
</style>
</head>
<body>
<h1>Honeytrace {version}: the interface</h1>
{sections}
</body>
</html>
"""


def resolve_lazy_names(module: ModuleType) -> None:
    """Names that a module fetches when they are first used."""
    for name in getattr(module, "__all__", ()):
        setattr(module, name, getattr(module, name))


def resolve_named_tuples(module: pdoc.doc.Module) -> None:
    """Their constructors hold annotations as text and do not say in which module to look the names up."""
    for entry in module.flattened_own_members:
        if (
            isinstance(entry, pdoc.doc.Class)
            and issubclass(entry.obj, tuple)
            and hasattr(entry.obj, "_fields")
        ):
            entry.obj.__new__.__annotations__.update(typing.get_type_hints(entry.obj))


def build(directory: Path, names: list[str]) -> list[str]:
    """Write the pages of these modules, and the first page; gives the warnings there were."""
    import honeytrace

    pdoc.render.configure(docformat="google", footer_text=f"Honeytrace {honeytrace.__version__}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name in names:
            resolve_lazy_names(importlib.import_module(name))
        for name in names:
            resolve_named_tuples(pdoc.doc.Module.from_name(name))
        # What the package itself names comes with it.
        within = {f"honeytrace.{name}" for name in honeytrace.__all__} if "honeytrace" in names else set()
        pdoc.pdoc(*(name for name in names if name not in within), output_directory=directory)
    (directory / "index.html").write_text(index(honeytrace.__version__), encoding="utf-8")
    return [str(warning.message) for warning in caught if "pdoc" in (warning.filename or "")]


def index(version: str) -> str:
    """The first page."""
    sections = ""
    for title, modules in ORDER.items():
        entries = "".join(
            f'<dt><a href="{name.replace(".", "/")}.html"><code>{name}</code></a></dt>'
            f"<dd>{html.escape(what)}</dd>\n"
            for name, what in modules.items()
        )
        sections += f"<h2>{title}</h2>\n<dl>\n{entries}</dl>\n"
    return PAGE.format(version=html.escape(version), sections=sections)


def main() -> None:
    directory = Path(sys.argv[1] if len(sys.argv) > 1 else "build/api")
    told = build(directory, sys.argv[2:] or [name for group in ORDER.values() for name in group])
    for text in told:
        print(f"warning: {inspect.cleandoc(text)}", file=sys.stderr)
    print(directory / "index.html")
    sys.exit(1 if told else 0)


if __name__ == "__main__":
    main()
