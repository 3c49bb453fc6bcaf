"""Which way of attention a run takes, and the TPU's kernel against the plain one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_parallel import sizes

from l1_jax.config.schema import Config
from l1_jax.errors import UserError
from l1_jax.model.attend import attend, causal_mask
from l1_jax.model.backends import attend_cudnn, attend_splash, choose_attention, cudnn_refuses
from l1_jax.model.section import ModelConfig
from l1_jax.parallel.mesh import abstract_mesh, create_mesh


@pytest.mark.parametrize("documents", [False, True])
def test_the_tpus_kernel_is_plain_attention_on_any_mesh(documents):
    draw, order = np.random.default_rng(0).standard_normal, np.arange(128)
    q, d_y = draw((2, 4, 128, 4, 8), np.float32)
    k, v = draw((2, 4, 128, 2, 8), np.float32)
    mask = causal_mask(order[None], 128)
    segments = jnp.broadcast_to(order // 50, (4, 128)) if documents else None
    if documents:
        mask &= (segments[:, :, None] == segments[:, None])[:, None]

    def both_ways(way):
        y, gradients = jax.vjp(way, q, k, v)
        return y, *gradients(d_y)

    plain = both_ways(lambda *qkv: attend(*qkv, mask, 0.0, None, order))
    mesh = create_mesh(sizes("fsdp=4 tensor=2"), jax.devices())
    with jax.set_mesh(mesh):
        found = both_ways(lambda *qkv: attend_splash(*qkv, segments, interpret=True))
    for a, b in zip(found, plain, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_which_attention_a_run_takes():
    model = ModelConfig(max_seq_length=256, n_heads=4, n_embd=256, dropout=0.0)
    start = Config(model).replace("training", precision="bfloat16")

    def chosen(platform, mesh="data=1", **keys):
        config = start
        for name, value in keys.items():
            section = {"d": "data", "m": "model", "t": "training"}[name[0]]
            config = config.replace(section, **{name[2:]: value})
        return choose_attention(
            config,
            abstract_mesh(sizes(mesh), 1 if mesh == "data=1" else 8),
            config.model.dropout,
            platform,
        )

    assert [chosen(on).name for on in ("gpu", "tpu", "cpu", None)] == [
        "cudnn",
        "splash",
        "blocked",
        "plain",
    ]
    assert chosen("tpu", d_document_mask=True).name == "splash"
    for on, keys, why in [
        ("gpu", {"m_dropout": 0.1}, "dropout"),
        ("tpu", {"m_dropout": 0.1}, "dropout"),
        ("gpu", {"t_precision": "float32"}, "bfloat16"),
        ("gpu", {"d_document_mask": True}, "document"),
        ("gpu", {"m_n_heads": 1}, "256"),
        ("tpu", {"m_max_seq_length": 200}, "128"),
        ("cpu", {"mesh": "context=8"}, "context"),
        ("gpu", {"mesh": "context=8"}, "context"),
        ("tpu", {"mesh": "pipeline=8"}, "pipeline"),
    ]:
        backend = chosen(on, **keys)
        assert backend.name == "plain"
        assert why in backend.why
    with pytest.raises(UserError, match="cudnn cannot run: it is for NVIDIA GPUs"):
        chosen("cpu", t_attention="cudnn")
    assert chosen("gpu", t_attention="blocked", m_dropout=0.1) == ("blocked", None)
    assert "cuDNN" in cudnn_refuses(64, "bfloat16")  # a CPU has none


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN is for NVIDIA GPUs")
def test_cudnns_attention_is_plain_attention():
    draw, order = np.random.default_rng(0).standard_normal, np.arange(256)
    q, k, v, d_y = (jnp.asarray(x, jnp.bfloat16) for x in draw((4, 2, 256, 4, 64)))
    mask = causal_mask(order[None], 256)

    def both_ways(way):
        y, gradients = jax.jit(functools.partial(jax.vjp, way))(q, k, v)
        return y, *gradients(d_y)

    plain = both_ways(lambda *qkv: attend(*qkv, mask, 0.0, None, order))
    for a, b in zip(both_ways(attend_cudnn), plain, strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), atol=0.05)
