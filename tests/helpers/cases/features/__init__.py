"""Test cases of the terms in `kdbench.terms.features`."""
