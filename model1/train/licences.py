"""Which licences training text may have, read from the metadata of installed packages.

A package is accepted only if every licence that its metadata names is permissive and known here;
anything else, a silent metadata file included, is refused by name. Licence files decide nothing
but which of the BSD licences is meant where the metadata says just "BSD".
"""

from __future__ import annotations

import re
from importlib.metadata import Distribution, PackageMetadata
from pathlib import Path

from model1.errors import DataError

# SPDX identifiers (https://spdx.org/licenses), lower case
PERMISSIVE_SPDX = frozenset(
    {"mit", "mit-0", "mit-cmu", "isc", "hpnd", "bsd-2-clause", "bsd-3-clause", "0bsd"}
    | {"apache-2.0", "llvm-exception", "psf-2.0", "python-2.0", "cnri-python", "zlib"}
    | {"cc0-1.0", "unlicense", "bsl-1.0"}
)

# names met in trove classifiers and in the free-text License field -> what is recorded
_KNOWN_NAMES = {
    "mit": "MIT",
    "mit license": "MIT",
    "bsd": "BSD",
    "bsd license": "BSD",
    "apache 2.0": "Apache-2.0",
    "apache license 2.0": "Apache-2.0",
    "apache software license": "Apache-2.0",
    "isc license (iscl)": "ISC",
    "python software foundation license": "PSF-2.0",
    "public domain": "Public-Domain",
}

_LICENCE_FILE = re.compile(r"\.dist-info/(.*/)?(licen[cs]e|copying)[^/]*$", re.IGNORECASE)
_BSD_GRANT = "redistribution and use in source and binary forms"
_BSD_ENDORSEMENT = "endorse or promote products"  # the third clause

_CLASSIFIER_PREFIX = "License :: "
# umbrella classifiers that name no licence
_UMBRELLAS = frozenset({"OSI Approved", "DFSG approved"})


def permissive_licence(text: str) -> str:
    """The licence to record for an SPDX expression or a well-known licence name.

    Raises DataError if any part of the expression is not known to be permissive. `A OR B` asks
    for both, because the record does not say which one was chosen.
    """
    known = _KNOWN_NAMES.get(text.strip().lower())
    if known is not None:
        return known
    parts = [p for p in re.split(r"\s+(?:AND|OR|WITH)\s+|[()]", text) if p.strip()]
    refused = [p.strip() for p in parts if p.strip().lower() not in PERMISSIVE_SPDX]
    if refused or not parts:
        raise DataError(f"licence {text!r} is not known to be permissive: {refused or 'empty'}")
    return text.strip()


def distribution_licence(distribution: Distribution) -> str:
    """Licence of an installed package: `License-Expression`, else classifiers, else `License`.

    "BSD" becomes BSD-2-Clause or BSD-3-Clause where the `License` field or a licence file tells.
    Raises DataError naming the package when the licence is missing or not permissive.
    """
    metadata = distribution.metadata
    name = metadata["Name"]
    expression = _field(metadata, "License-Expression")
    classifiers = _licence_classifiers(metadata.get_all("Classifier") or [])
    free_text = _field(metadata, "License")
    try:
        if expression:
            return permissive_licence(expression)
        names = [permissive_licence(text) for text in classifiers or [free_text]]
    except DataError as error:
        raise DataError(f"package {name}: {error}") from error
    bsd = _which_bsd(distribution, free_text) if "BSD" in names else "BSD"
    return " AND ".join(dict.fromkeys(bsd if name == "BSD" else name for name in names))


def _which_bsd(distribution: Distribution, free_text: str) -> str:
    texts = [free_text]
    for file in distribution.files or []:
        path = Path(str(file.locate()))
        if _LICENCE_FILE.search(file.as_posix()) and path.is_file():
            texts.append(path.read_text(encoding="utf-8", errors="replace"))
    found = {name for text in texts if (name := _bsd_of_text(text)) is not None}
    return found.pop() if len(found) == 1 else "BSD"


def _bsd_of_text(text: str) -> str | None:
    """The BSD licence that a text names or is; None if it is neither, or several that differ."""
    text = " ".join(text.lower().split())
    num_grants, num_endorsements = text.count(_BSD_GRANT), text.count(_BSD_ENDORSEMENT)
    if num_grants == 0:
        named = re.search(r"\bbsd[- ]([23])[- ]clause\b|\b([23])[- ]clause bsd\b", text)
        return None if named is None else f"BSD-{named[1] or named[2]}-Clause"
    if "advertising materials" in text:  # the four-clause licence
        return None
    if num_endorsements == 0:
        return "BSD-2-Clause"
    return "BSD-3-Clause" if num_endorsements == num_grants else None


def _field(metadata: PackageMetadata, name: str) -> str:
    return metadata[name].strip() if name in metadata else ""


def _licence_classifiers(classifiers: list[str]) -> list[str]:
    names = [c.split("::")[-1].strip() for c in classifiers if c.startswith(_CLASSIFIER_PREFIX)]
    return [n for n in names if n not in _UMBRELLAS]
