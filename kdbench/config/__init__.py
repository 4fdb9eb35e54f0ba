"""Recipe in, checked frozen dataclasses out: the schema, the loader, identities and schedules. No torch.

`compose` turns files and overrides into one mapping, `parse` turns that mapping into the schema. Nothing after this
package knows YAML, Hydra or OmegaConf."""
