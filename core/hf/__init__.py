"""Everything that touches transformers: cache, layer, lazy handles, attention and masks, attach, rope."""
