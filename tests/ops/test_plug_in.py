"""Backend plug-ins: the operators' own tests on the example, and calls for every installed one.

Install a plug-in and run this file: the operators of CASES get the inputs below, on a device of the
type that the plug-in claims, else on the CPU, with NaN in the memory that they may not use.
docs/backends.md says how to run the operators' own tests on it.
"""

from __future__ import annotations
