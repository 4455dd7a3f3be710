"""The GPU forms of the operations in `..reference`, in Triton; importing this package needs triton."""
