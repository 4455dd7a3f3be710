"""What a language model's config and modules say about it, whatever its architecture calls things."""

from torch import nn
from transformers import PreTrainedModel

SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def softcap(model: PreTrainedModel) -> float | None:
    """The c of c·tanh(logits/c), None for a model that does not cap its logits."""
    config = model.config.get_text_config()
    return next((float(cap) for name in SOFTCAPS if (cap := getattr(config, name, None))), None)


def logit_scale(model: PreTrainedModel) -> float:
    """The constant that a model multiplies its logits by, before it caps them."""
    config = model.config.get_text_config()
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier"):  # Cohere, Falcon-H1
        scale *= getattr(config, name, None) or 1.0
    return scale / (getattr(config, "logits_scaling", None) or 1.0)  # Granite


def max_context(model: PreTrainedModel) -> int | None:
    """The most tokens that a model reads at once, None where its config names no limit."""
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            limit = module.num_embeddings - module.padding_idx - 1  # RoBERTa's positions begin after the padding's
    return limit if limit and limit > 0 else None


def hidden_size(model: PreTrainedModel) -> int | None:
    """Width of the last hidden state, None where the config does not say."""
    width: int | None = getattr(model.config.get_text_config(), "hidden_size", None)
    return width


def n_blocks(model: PreTrainedModel) -> int:
    """How many blocks the config names, 0 where it does not say."""
    return int(getattr(model.config.get_text_config(), "num_hidden_layers", 0))


def block_list(model: PreTrainedModel) -> str | None:
    """The name of the list that holds a model's blocks; None if no module, or more than one, can be it.

    It is as long as the config says and not inside another such list. Where a vision tower has as many blocks, the text
    model's are those that lie beside the module that reads tokens.
    """
    length = n_blocks(model)
    modules = dict(model.named_modules())
    found = [name for name, module in modules.items() if isinstance(module, nn.ModuleList) and len(module) == length]
    found = [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
    if len(found) > 1:
        embedding = next(name for name, module in modules.items() if module is model.get_input_embeddings())
        found = [name for name in found if name.rpartition(".")[0] == embedding.rpartition(".")[0]]
    return found[0] if len(found) == 1 else None
