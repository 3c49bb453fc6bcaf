"""The keys of the model's shape."""

import dataclasses
from typing import Literal

from l1_jax.config.key import key, when


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of the network."""

    vocab_size: int = key(
        50257,
        "ceiling of the vocabulary; a smaller tokenizer is used as it is",
        resume="fatal",
        ge=1,
        le=2**24,
    )
    max_seq_length: int = key(
        1024, "context length in tokens", resume="fatal", is_of_measure=True, ge=1, le=2**24
    )
    n_layers: int = key(12, "transformer blocks", resume="fatal", ge=1, le=2**16)
    n_heads: int = key(12, "attention heads per block", resume="fatal", ge=1, le=2**16)
    n_embd: int = key(768, "model width", resume="fatal", ge=1, le=2**20)
    n_kv_heads: int | None = key(
        None,
        "heads of keys and values, each for a group of n_heads; null is n_heads",
        resume="fatal",
        ge=1,
        le=2**16,
    )
    n_inner: int | None = key(
        None,
        "hidden width of the MLP; null is 4 x n_embd, with swiglu 8/3 of it in multiples of 64",
        resume="fatal",
        ge=1,
        le=2**22,
    )
    head_size: int | None = key(
        None, "width of a head; null is n_embd / n_heads", resume="fatal", ge=1, le=2**16
    )
    dropout: float = key(
        0.1,
        "rate on embeddings, attention weights and residual branches",
        resume="warned",
        ge=0.0,
        lt=1.0,
    )
    attention_dropout: float | None = key(
        None,
        "rate on attention weights alone; null is dropout; 0 lets kernels of GPU and TPU run",
        resume="warned",
        ge=0.0,
        lt=1.0,
    )
    position_embedding: Literal["learned", "rope"] = key(
        "learned",
        "positions as vectors added to the tokens, or as rotations of queries and keys",
        resume="fatal",
    )
    rope_theta: float = key(
        10000.0,
        "rope's slowest wavelength is 2 pi times nearly this many positions",
        resume="fatal",
        used_with=when("model.position_embedding", "rope"),
        gt=1.0,
    )
    norm: Literal["layernorm", "rmsnorm"] = key(
        "layernorm", "norm before attention, MLP and head", resume="fatal"
    )
    layer_norm_epsilon: float = key(
        1e-5, "added to the variance, or the mean square, in norms", resume="fatal", gt=0.0
    )
    qk_norm: bool = key(False, "RMSNorm over each head of queries and keys", resume="fatal")
    activation: Literal["gelu", "relu_squared", "swiglu"] = key(
        "gelu", "of the MLP; swiglu has a third matrix", resume="fatal"
    )
    bias: bool = key(True, "linear maps add a bias", resume="fatal")
    tie_embeddings: bool = key(
        True,
        "the head is the table of token embeddings, or one of its own that starts at 0",
        resume="fatal",
    )
    logit_softcap: float | None = key(
        None,
        "logits are softcap x tanh(logits / softcap); null leaves them",
        resume="fatal",
        gt=0.0,
    )
    zero_init_projections: bool = key(
        False, "output projections of attention and MLP start at 0", resume="free"
    )
    initializer_range: float = key(
        0.02, "standard deviation of the initial weights", resume="free", gt=0.0
    )
    scan_layers: bool = key(
        True,
        "one compiled block scanned over depth (compiles fast) or a loop over the blocks",
        resume="free",
    )

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: matrix units like round sizes."""
        return -(-self.vocab_size // 128) * 128

    @property
    def head_dims(self) -> int:
        """H, the width of a head."""
        return self.head_size or self.n_embd // self.n_heads

    @property
    def attention_rate(self) -> float:
        """The rate of dropout on attention weights."""
        return self.dropout if self.attention_dropout is None else self.attention_dropout

    @property
    def drops(self) -> bool:
        """Whether anything is dropped in training."""
        return self.dropout > 0 or self.attention_rate > 0

    @property
    def hidden_size(self) -> int:
        gated = (
            -(-8 * self.n_embd // (3 * 64)) * 64
        )  # three matrices as large as the two of 4 x n_embd
        return self.n_inner or (gated if self.activation == "swiglu" else 4 * self.n_embd)

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads
