"""Sample a token corpus from a causal language model.

    python scripts/sample_quickstart_tokens.py MODEL_DIR OUT.safetensors --tokens 524288 --device cuda

Every sequence starts with the document-start token and is drawn from the model's own distribution:
temperature 1, no top-k, no top-p. A sequence that draws the document-start token begins a new document there.
The file holds `tokens` (int32, flat) and `doc_start` (int64, the offset of every document's first token).
Shapes: B sequences, T positions, V vocabulary, N tokens.
"""

import argparse
import hashlib
import json
import os
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import save
from transformers import AutoModelForCausalLM, AutoTokenizer

from polytope_hsae.lm.tokens import document_start

SAMPLER_FORMAT = "1"


@torch.inference_mode()
def sample_batch(
    model: torch.nn.Module, start_id: int, batch: int, context: int, generator: torch.Generator
) -> torch.Tensor:
    """Draw `batch` sequences of `context` tokens, int64 [B,T], each starting with `start_id`."""
    device = next(model.parameters()).device
    step_B1 = torch.full((batch, 1), start_id, dtype=torch.int64, device=device)
    columns, cache = [step_B1], None
    for _ in range(context - 1):
        output = model(input_ids=step_B1, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        probabilities_BV = output.logits[:, -1].float().softmax(-1)
        step_B1 = torch.multinomial(probabilities_BV, 1, generator=generator)
        columns.append(step_B1)
    return torch.cat(columns, dim=1)


def split_documents(ids_BT: np.ndarray, start_id: int, min_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut at start tokens, drop documents shorter than `min_tokens`: (tokens [N], doc_start [n_docs])."""
    flat = ids_BT.reshape(-1)
    bounds = np.append(np.flatnonzero(flat == start_id), flat.size)
    documents = [flat[a:b] for a, b in pairwise(bounds) if b - a >= min_tokens]
    if not documents:
        raise ValueError(f"--tokens: no document of at least {min_tokens} tokens was drawn, ask for more")
    lengths = np.array([0] + [len(document) for document in documents[:-1]], dtype=np.int64)
    return np.concatenate(documents).astype(np.int32), np.cumsum(lengths).astype(np.int64)


def serialize(tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> bytes:
    """The safetensors bytes with metadata in the given order (the library's own order is random)."""
    raw = save(tensors, metadata=metadata)
    header_end = 8 + int.from_bytes(raw[:8], "little")
    header = {**json.loads(raw[8:header_end]), "__metadata__": metadata}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + raw[header_end:]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=524288, help="tokens to draw, short documents included")
    parser.add_argument("--context", type=int, default=256, help="tokens per sequence")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=1024, help="sequences drawn at a time (changes draws)")
    parser.add_argument("--min-document", type=int, default=16, help="shorter documents are dropped")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(str(args.model_dir))
    start_id = document_start(tokenizer)
    if start_id is None:
        raise SystemExit(f"{args.model_dir}: the tokenizer has no document-start (bos) token")
    folder = str(args.model_dir)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    model = model.to(args.device).eval()
    generator = torch.Generator(device=args.device).manual_seed(args.seed)

    n_sequences = max(1, args.tokens // args.context)
    started, batches, done = time.monotonic(), [], 0
    while done < n_sequences:
        batch = min(args.batch, n_sequences - done)
        batches.append(sample_batch(model, start_id, batch, args.context, generator).cpu().numpy())
        done += batch
        rate = done * args.context / (time.monotonic() - started)
        total = n_sequences * args.context
        print(f"{done * args.context:,} of {total:,} tokens, {rate:,.0f} tokens/s", flush=True)
    tokens, doc_start = split_documents(np.concatenate(batches), start_id, args.min_document)

    metadata = {
        "format": SAMPLER_FORMAT,
        "model": args.model_dir.resolve().name,
        "model_sha256": hashlib.sha256((args.model_dir / "model.safetensors").read_bytes()).hexdigest(),
        "tokenizer_sha256": hashlib.sha256((args.model_dir / "tokenizer.json").read_bytes()).hexdigest(),
        "temperature": "1.0",
        "seed": str(args.seed),
        "batch": str(args.batch),
        "context": str(args.context),
        "device": torch.device(args.device).type,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    temporary = args.out.with_name(f".{args.out.name}.tmp")
    temporary.write_bytes(serialize({"tokens": tokens, "doc_start": doc_start}, metadata))
    os.replace(temporary, args.out)
    print(json.dumps({"tokens": int(tokens.size), "documents": int(doc_start.size), **metadata}, indent=1))


if __name__ == "__main__":
    main()
