"""The hardware catalogue: numbers, names and unknown devices."""

import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.cluster.hardware import CatalogueError, UnknownDevice, catalogue, device, match

GPUS = [name for name in catalogue() if name != "cpu"]
NEW = """
[MY-GPU]
memory_gib = 15.5
cuda_names = ["Acme One"]
peak_tflops = { bf16 = 100.0 }
source = "Acme data sheet"
"""


@pytest.mark.parametrize(
    ("name", "dtype", "tflops"),
    [
        ("RTX3090-24G", "bf16", 71),
        ("RTX4090-24G", "bf16", 165.2),
        ("A100-80G-SXM", "bf16", 312),
        ("A100-80G-SXM", "tf32", 156),
        ("A100-80G-SXM", "fp32", 19.5),
        ("H100-80G-SXM", "bf16", 989.4),
        ("H100-80G-PCIE", "fp16", 756),
        ("L40S-48G", "bf16", 362),
        ("B200-180G", "bf16", 2250),
    ],
)
def test_peaks_are_dense(name: str, dtype: str, tflops: float) -> None:
    assert device(name).peak_flops(dtype) == pytest.approx(tflops * 1e12)


@pytest.mark.parametrize("name", GPUS)
def test_every_gpu_has_all_fields(name: str) -> None:
    entry = device(name)
    nominal_gib = float(name.split("-")[1].removesuffix("G"))
    assert 0.9 * nominal_gib < entry.memory_gib < nominal_gib
    assert entry.memory_bytes == int(entry.memory_gib * 1024**3)
    assert entry.memory_bandwidth_gb_per_second
    assert entry.interconnect
    assert entry.interconnect_gb_per_second
    assert entry.source
    assert entry.host_link_gb_per_second in (64, 128)  # sixteen lanes of PCIe 4 or 5
    assert entry.network_gb_per_second
    assert entry.network_gb_per_second < entry.interconnect_gb_per_second
    assert entry.host_memory_gib
    assert entry.host_memory_gib >= 63
    assert entry.system
    bf16, fp16, tf32, fp32 = (entry.peak_flops(dtype) for dtype in ("bf16", "fp16", "tf32", "fp32"))
    assert bf16
    assert tf32
    assert fp32
    assert bf16 == fp16
    # A rate with sparsity would break this ratio, which holds for all generations.
    assert bf16 / tf32 == pytest.approx(2, rel=0.02)
    assert tf32 >= fp32


def test_a_cuda_name_belongs_to_one_device() -> None:
    names = [cuda_name for entry in catalogue().values() for cuda_name in entry.cuda_names]
    assert len(names) == len(set(names))


def test_cpu_has_no_peak() -> None:
    assert device("cpu").peak_flops("bf16") is None
    assert device("cpu").peak_flops("fp32") is None


def test_an_unsupported_dtype_has_no_peak() -> None:
    assert device("A100-80G-SXM").peak_flops("fp8") is None


@pytest.mark.parametrize(
    ("cuda_name", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100-80G-SXM"),
        ("A100-SXM4-40GB", "A100-40G-SXM"),
        ("NVIDIA A100 80GB PCIe", "A100-80G-PCIE"),
        ("NVIDIA H100 80GB HBM3", "H100-80G-SXM"),
        ("NVIDIA H100 PCIe", "H100-80G-PCIE"),
        ("NVIDIA H200", "H200-141G"),
        ("NVIDIA GeForce RTX 4090", "RTX4090-24G"),
        ("GeForce RTX 3090", "RTX3090-24G"),
        ("NVIDIA B200", "B200-180G"),
    ],
)
def test_match_accepts_cuda_names(cuda_name: str, name: str) -> None:
    found = match(cuda_name)
    assert found is not None
    assert found.name == name


@pytest.mark.parametrize(
    "cuda_name",
    [
        "",
        "NVIDIA",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA H100 NVL",
        "NVIDIA H200 NVL",
        "NVIDIA H800 PCIe",
        "NVIDIA GH200 480GB",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "Tesla T4",
    ],
)
def test_match_rejects_related_devices(cuda_name: str) -> None:
    assert match(cuda_name) is None


def test_an_unknown_device_lists_known_devices_and_the_remedy() -> None:
    with pytest.raises(UnknownDevice, match="'A100'") as caught:
        device("A100")
    message = str(caught.value)
    assert all(name in message for name in catalogue())
    assert "--catalogue" in message


def test_an_extra_catalogue_adds_and_overrides_devices(tmp_path: Path) -> None:
    extra = tmp_path / "mine.toml"
    extra.write_text(NEW + '[H200-141G]\nmemory_gib = 1.0\nsource = "mine"\n', encoding="utf-8")
    assert device("MY-GPU", extra).peak_flops("bf16") == 100e12
    assert device("H200-141G", extra).memory_gib == 1.0
    assert match("Acme One", extra) == device("MY-GPU", extra)
    assert match("Acme One") is None
    assert device("H200-141G").memory_gib > 100


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("not toml", "cannot be read"),
        ("a = 1", "write \\[a\\]"),
        ('[a]\nsource = "x"', "memory_gib: Field required"),
        ('[a]\nsource = "x"\nmemory_gib = -1', "memory_gib: .* greater than 0"),
        ('[a]\nsource = "x"\nmemory_gib = 1\nmemory = 2', "memory: Extra inputs"),
        ('[a]\nsource = "x"\nmemory_gib = 1\npeak_tflops = { fp4 = 1 }', "peak_tflops.fp4: Extra inputs"),
    ],
)
def test_an_invalid_catalogue_error_names_the_field(tmp_path: Path, text: str, complaint: str) -> None:
    extra = tmp_path / "mine.toml"
    extra.write_text(text, encoding="utf-8")
    with pytest.raises(CatalogueError, match=complaint):
        catalogue(extra)


def test_a_missing_catalogue_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CatalogueError, match=r"absent\.toml cannot be read"):
        catalogue(tmp_path / "absent.toml")


def test_catalogue_entries_are_immutable() -> None:
    with pytest.raises(ValueError, match="frozen"):
        setattr(device("cpu"), "memory_gib", 1.0)  # noqa: B010
    catalogue().clear()
    assert catalogue()


@pytest.mark.process
def test_the_package_imports_no_framework() -> None:
    heavy = "{'torch', 'ray', 'numpy', 'deepspeed', 'transformers', 'yaml', 'orchestrator.config.schema'}"
    modules = ", ".join(f"orchestrator.cluster.{name}" for name in ("hardware", "placement", "topology"))
    code = f"import sys, {modules}; sys.exit(str({heavy} & set(sys.modules) or ''))"
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""
