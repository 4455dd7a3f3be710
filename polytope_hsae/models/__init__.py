"""Autoencoders. Both kinds are imported here, so that `SparseAutoencoder.from_pretrained` knows them."""

from . import flat as flat
from . import hsae as hsae
