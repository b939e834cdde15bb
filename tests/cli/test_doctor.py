"""Checks of `flash doctor`."""

from pathlib import Path

from flashtensors.checkpoint.catalog import Catalog
from flashtensors.checkpoint.pull import pull
from flashtensors.cli.doctor_bytes import check_reader
from flashtensors.cli.finding import Finding
from flashtensors.config import Settings
from flashtensors.testing.checkpoints import tiny_config, write_tiny_checkpoint, write_tiny_tokenizer


def test_the_reader_is_the_one_of_a_load(store: Path, tmp_path: Path) -> None:
    settings = Settings(device="cpu", storage_path=str(store))
    assert check_reader(settings) == Finding("reader", "ok", "no model in the store yet: chosen when one is loaded")
    folder = write_tiny_checkpoint(tmp_path / "tiny", tiny_config("llama"), dtype="bfloat16")
    write_tiny_tokenizer(folder)
    pull(Catalog(store), str(folder))
    finding = check_reader(settings)
    assert (finding.check, finding.status) == ("reader", "ok")
    assert finding.text.startswith("mmap for ")
    assert " and buffered for " in finding.text
    assert "of tiny: on a CPU weights are used where they lie in their files" in finding.text
    next(folder.glob("*.safetensors")).write_bytes(b"damaged")
    finding = check_reader(settings)
    assert (finding.check, finding.status) == ("reader", "error")
    assert "tiny: " in finding.text
