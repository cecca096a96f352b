"""The only torch in the foundation: the transformer and its bridge to Parameters."""
