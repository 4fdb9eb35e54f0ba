"""From files and overrides to one composed mapping: layers, shorthand, merging, overrides, Hydra.

The meaning of keys is not known here; `kdbench.config.parse` checks them."""
