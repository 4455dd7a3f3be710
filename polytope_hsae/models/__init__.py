"""Autoencoders. Every kind is imported here, so that `SparseAutoencoder.from_pretrained` knows it."""

from . import batchtopk as batchtopk
from . import flat as flat
from . import hsae as hsae
from . import jumprelu as jumprelu
from . import matryoshka as matryoshka
