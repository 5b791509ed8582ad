"""Names that are put together."""

from structmat._names import alike


def test_names_that_differ_in_numbers_are_one() -> None:
    names = [(f"model.layers.{k}.mlp.{own}", "x") for k in range(30) for own in ("up_proj", "down_proj")]
    assert list(alike(names)) == ["model.layers.{0-29}.mlp.up_proj", "model.layers.{0-29}.mlp.down_proj"]
    assert alike(names)["model.layers.{0-29}.mlp.up_proj"] == [f"model.layers.{k}.mlp.up_proj" for k in range(30)]


def test_gaps_other_values_and_several_numbers() -> None:
    assert list(alike([(f"h.{k}", k == 2) for k in (0, 1, 2, 3, 7)])) == ["h.{0-1,3,7}", "h.2"]
    experts = [(f"layers.{k}.experts.{e}.w1", 0) for k in range(2) for e in range(8)]
    assert list(alike(experts)) == ["layers.{0-1}.experts.{0-7}.w1"]
    assert list(alike(experts[:-1])) == [name for name, _ in experts[:-1]]  # not all combinations
    assert list(alike([("conv1", 0), ("conv2", 0)])) == ["conv1", "conv2"]  # numbers within words are words
    assert alike([]) == {}
