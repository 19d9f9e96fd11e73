"""The stages around the update rule: options, scalars and torch reference, one file each."""
