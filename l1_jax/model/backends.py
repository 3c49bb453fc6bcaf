"""Which way of attention a run takes, and the devices' own kernels for it.

Legend: B batch, T length, N heads, K key/value heads, H head size.
"""

import math
from typing import NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, Mesh

from l1_jax.config.schema import Config
from l1_jax.errors import UserError
from l1_jax.model.attend import ATTENTION
from l1_jax.parallel.layout import Layout
from l1_jax.parallel.sharding import is_divided, spec

FASTEST = {"gpu": "cudnn", "tpu": "splash", "cpu": "blocked"}


class Backend(NamedTuple):
    """A way of attention, and why it is not the fastest of the platform."""

    name: str  # plain, blocked, cudnn or splash
    why: str | None


def choose_attention(
    config: Config, mesh: Mesh | AbstractMesh, dropout: float, platform: str | None = None
) -> Backend:
    """The backend that `training.attention` means.

    For auto it is the platform's fastest, or `plain` where that cannot run.

    Args:
        config: of the run.
        mesh: of the computation.
        dropout: of the computation; 0 in an evaluation.
        platform: for whose devices a plan is made; None takes that of the mesh's devices.

    Raises:
        UserError: where what is asked for cannot run.
    """
    if platform is None and isinstance(mesh, Mesh):
        platform = mesh.devices.flat[0].platform
        if platform == "cuda":
            platform = "gpu"

    asked = config.training.attention
    wanted = FASTEST.get(platform or "", "plain") if asked == "auto" else asked
    why = obstacle(wanted, config, mesh, dropout, platform)
    if why is None:
        return Backend(wanted, why=None)

    if asked != "auto":
        raise UserError(
            f"training.attention {asked} cannot run: {why}",
            "Change that, or set training.attention: auto",
        )
    return Backend("plain", why=f"not {wanted}: {why}")


def obstacle(
    name: str,
    config: Config,
    mesh: Mesh | AbstractMesh,
    dropout: float,
    platform: str | None = None,
) -> str | None:
    """Why the backend `name` cannot run there; None where it can.

    The other arguments are those of `choose_attention`; without a platform any will do.
    """
    model = config.model
    precision = config.training.precision
    head_size = model.head_dims
    layout = Layout.of(mesh)

    # A plan without devices is for any that are new enough.
    device = mesh.devices.flat[0] if isinstance(mesh, Mesh) else None
    capability = str(getattr(device, "compute_capability", "8.0"))
    has_number = capability[0].isdigit()  # AMD's GPUs have a name, as gfx942

    # From each reason to whether it holds; the first that does is given.
    divided = {"parallelism.context divides the sequence": layout.context > 1}
    of_kernels = {
        "it drops no attention weights: model.attention_dropout, or else model.dropout, is not 0": (
            dropout > 0
        ),
        **divided,
        "it does not run in a pipeline": layout.stages > 1,
    }
    cudnn_sizes = f"it takes heads of 8, 16, ... 128 dimensions, not {head_size}"
    reasons: dict[str, dict[str, bool]] = {
        "plain": {},
        "blocked": divided,
        "cudnn": {
            "it is for NVIDIA GPUs": platform not in ("gpu", None) or not has_number,
            "it needs compute capability 8.0": capability[:2] in ("5.", "6.", "7."),
            "it computes in bfloat16 or float16": precision == "float32",
            cudnn_sizes: head_size % 8 > 0 or head_size > 128,
            "it has no document mask": config.data.document_mask,
            **of_kernels,
        },
        "splash": {
            "it is for TPUs": platform not in ("tpu", None),
            "it takes sequences of 128, 256, ... tokens": model.max_seq_length % 128 > 0,
            **of_kernels,
        },
    }
    for reason, applies in reasons[name].items():
        if applies:
            return reason

    # Where there is a device, the library that is installed has the last word.
    if name == "cudnn" and device is not None:
        return cudnn_refuses(head_size, precision)
    return None


def cudnn_refuses(size: int, precision: str) -> str | None:
    """What jax says against heads of `size` by the cuDNN that is installed; None where nothing."""
    x_BTNH = jax.ShapeDtypeStruct((1, 128, 1, size), precision)
    try:
        jax.eval_shape(attend_cudnn, x_BTNH, x_BTNH, x_BTNH)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        first_line, _, _ = str(error).partition("\n")
        return first_line
    return None


def attend_cudnn(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> jax.Array:
    """Causal attention by cuDNN's flash kernel: `[B, T, N, H]`."""
    y_BTNH = jax.nn.dot_product_attention(
        q_BTNH, k_BTKH, v_BTKH, is_causal=True, implementation="cudnn"
    )
    return checkpoint_name(y_BTNH, ATTENTION)


def attend_splash(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array | None,
    interpret: bool = False,
) -> jax.Array:
    """Causal attention by JAX's Pallas kernel for TPUs, each device for its rows and heads.

    Args:
        q_BTNH: queries.
        k_BTKH: keys.
        v_BTKH: values.
        segment_ids_BT: int32; attention stays among equal ones. None: all is one document.
        interpret: runs it anywhere, slowly.

    Returns:
        `[B, T, N, H]`.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # takes a while

    length, _, head_size = q_BTNH.shape[1:]
    block = next(size for size in (512, 384, 256, 128) if length % size == 0)
    block_sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )

    def local(q, k, v, segment_ids):
        num_heads = q.shape[2]
        mask = splash.MultiHeadMask([splash.CausalMask((length, length))] * num_heads)
        kernel = splash.make_splash_mha(
            mask,
            block_sizes=block_sizes,
            head_shards=1,
            q_seq_shards=1,
            residual_checkpoint_name=ATTENTION,
            interpret=interpret,
        )

        # The kernel is for one row, its heads first, and does not scale.
        q = (q / math.sqrt(head_size)).swapaxes(1, 2)
        k = k.swapaxes(1, 2)
        v = v.swapaxes(1, 2)
        segments = None
        if segment_ids is not None:
            segments = splash.SegmentIds(q=segment_ids, kv=segment_ids)
        return jax.vmap(kernel)(q, k, v, segments).swapaxes(1, 2)

    if not is_divided():
        return local(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)

    heads = spec(("batch", None, "heads", None))
    rows = None if segment_ids_BT is None else spec(("batch", None))
    mapped = jax.shard_map(
        local, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False
    )
    return mapped(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)
