"""Eight simulated devices and a compiler in a hurry for every test, set before jax is imported."""

import os
import sys
from pathlib import Path

import pytest

# What is tested are equalities, not speed: unoptimised code compiles four times as fast.
QUICK_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {QUICK_COMPILE}"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")

SHARED = Path(__file__).parents[1].parent / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real text and tools that lie beside the checkout on the project's own machines."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not here")
    return SHARED
