"""Any Hugging Face BERT-like encoder: mid tokens, high tokens and a global vector in one pass (METHOD section 1)."""

from typing import NamedTuple

from torch import Tensor, nn

from hacan.errors import UserError


class TextFeatures(NamedTuple):
    """M texts after the backbone. Rows of padding hold values without a meaning."""

    high: Tensor  # [M, W, C] tokens of the high level
    mid: Tensor  # [M, W, C] tokens of the mid level
    pooled: Tensor  # [M, C] the pooler's output, or the first token's last state where there is no pooler


class TextEncoder(nn.Module):
    """A transformers encoder that gives two of its hidden states and a global vector.

    Levels count as in `hidden_states`: 0 is the embedding output, k the output of layer k; negative ones from the end.
    The global vector is the pooler's output; an encoder without a pooler (DistilBERT, ELECTRA, ModernBERT) gives the
    last state of its first token ([CLS]). METHOD section 1.
    """

    def __init__(self, *, backbone: nn.Module, levels: tuple[int, int], name: str = "") -> None:
        """`backbone`: what `AutoModel` gives; `name`: what error messages call it."""
        super().__init__()
        self.name = name or type(backbone).__name__
        self.width: int = backbone.config.hidden_size
        self.levels = self._positions(levels, backbone.config.num_hidden_layers + 1)
        pad_id = backbone.config.pad_token_id
        self.pad_id: int = 0 if pad_id is None else pad_id
        self.max_tokens = _max_tokens(backbone)
        self.backbone = backbone

    def _positions(self, levels: tuple[int, int], count: int) -> tuple[int, int]:
        """The two levels counted from 0."""
        mid, high = (level + count if level < 0 else level for level in levels)
        if not (0 <= mid < count and 0 <= high < count):
            raise UserError(
                f"text_levels={list(levels)}: text_encoder={self.name!r} has {count} hidden states (its embedding "
                f"output and {count - 1} layers): give two from {-count} to {count - 1}, such as [-2, -1]"
            )
        return mid, high

    @property
    def has_pooler(self) -> bool:
        """Whether the global vector comes from a pooler (or else from the first token)."""
        return getattr(self.backbone, "pooler", None) is not None

    def forward(self, token_ids: Tensor, token_mask: Tensor) -> TextFeatures:
        """[M, W] int64 and [M, W] bool (True: a real token) -> two levels of tokens, and the global vector."""
        if token_ids.shape[1] > self.max_tokens:
            raise UserError(
                f"captions of {token_ids.shape[1]} tokens, but text_encoder={self.name!r} has positions for "
                f"{self.max_tokens}: set max_text_len={self.max_tokens} or less"
            )
        # Padding is masked by id too: RoBERTa counts its positions by what is not the pad token.
        outputs = self.backbone(
            input_ids=token_ids.masked_fill(~token_mask, self.pad_id),
            attention_mask=token_mask.long(),
            output_hidden_states=True,
            return_dict=True,
        )
        states = outputs.hidden_states
        pooled = outputs.pooler_output if self.has_pooler else outputs.last_hidden_state[:, 0]
        return TextFeatures(high=states[self.levels[1]], mid=states[self.levels[0]], pooled=pooled)


def _max_tokens(backbone: nn.Module) -> int:
    """How many tokens a caption may have: the position embeddings, less those that RoBERTa's kin keep for padding."""
    table = getattr(getattr(backbone, "embeddings", None), "position_embeddings", None)
    offset = getattr(table, "padding_idx", None)
    return getattr(backbone.config, "max_position_embeddings", 1 << 30) - (0 if offset is None else offset + 1)
