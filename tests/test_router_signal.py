"""scripts/router_signal.py: its measures by hand, and that it trains as train.py does."""

import router_signal
import torch
from conftest import SMALL, adapter_of, succeed

import registry

SHORT = ("--epochs", "2", "--learning_rate", "1e-2", "--regroup_every", "2", "--eval_tasks", "none")


def test_signal_by_hand():
    """n for equal gradients, 0 for opposite ones, 1 for orthogonal ones."""
    seen = router_signal.Gradients()
    east, north = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    seen.add(torch.stack([east, east, east]))
    assert seen.cosine.isnan().all()
    seen.add(torch.stack([east, -east, north]))
    assert seen.signal().tolist() == [2.0, 0.0, 1.0] and seen.cosine.tolist() == [1.0, -1.0, 0.0]


def test_it_watches_a_run_and_changes_nothing(tiny, tmp_path, capsys, monkeypatch):
    """Same adapter as train.py; a line per measurement, whose router moves in what it logs."""
    monkeypatch.setitem(registry.METHODS, "badit", registry.METHODS["badit"])
    succeed(*tiny, *SMALL, *SHORT, "--output_dir", tmp_path / "plain")
    argv = [*map(str, (*tiny, *SMALL)), *SHORT, "--output_dir", str(tmp_path / "watched")]
    assert router_signal.main(argv) == 0
    plain, watched = (adapter_of(tmp_path / name) for name in ("plain", "watched"))
    assert plain.keys() == watched.keys()
    assert all(torch.equal(plain[name], watched[name]) for name in plain)
    out = capsys.readouterr().out.splitlines()
    rows = out[out.index("  ".join(router_signal.COLUMNS)) + 1:]
    words = [row.split() for row in rows if row.strip()]
    numbers = [list(map(float, row)) for row in words if row[0].isdigit()]
    assert [row[0] for row in numbers] == [2, 4, 6, 8, 10]
    for step, *norms, router_cosine, bank_cosine, router, bank, experts, tokens, noise in numbers:
        assert all(norm > 0 for norm in (*norms, experts, tokens)) and noise == 0.125
        assert -1 <= router_cosine <= 1 and -1 <= bank_cosine <= 1
        assert 0 <= router <= step and 0 <= bank <= step
