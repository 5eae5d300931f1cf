"""Which licences training text may have, read from the metadata of installed packages.

A package is accepted only if every licence that its metadata names is permissive and known here;
anything else, a silent metadata file included, is refused by name. Licence files are not parsed.
"""

from __future__ import annotations

import re
from importlib.metadata import Distribution, PackageMetadata

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
        if classifiers:
            return " AND ".join(dict.fromkeys(permissive_licence(c) for c in classifiers))
        return permissive_licence(free_text)
    except DataError as error:
        raise DataError(f"package {name}: {error}") from error


def _field(metadata: PackageMetadata, name: str) -> str:
    return metadata[name].strip() if name in metadata else ""


def _licence_classifiers(classifiers: list[str]) -> list[str]:
    names = [c.split("::")[-1].strip() for c in classifiers if c.startswith(_CLASSIFIER_PREFIX)]
    return [n for n in names if n not in _UMBRELLAS]
