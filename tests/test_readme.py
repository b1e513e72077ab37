"""README.md says what the reference study's tables say, and its code runs."""

import re
from pathlib import Path

import pytest
import torch

from drs.config import PROJECT_ROOT
from drs.errors import UserError
from drs.readme import fill

README = (PROJECT_ROOT / "README.md").read_text(encoding="utf-8")
REFERENCE = PROJECT_ROOT / "results" / "reference" / "laptop"


def test_numbers_in_the_readme_come_from_the_reference_tables() -> None:
    assert fill(README, REFERENCE) == README, "run scripts/readme.py"


def test_a_number_typed_by_hand_would_be_noticed() -> None:
    assert fill(README.replace("**not supported**", "**supported**"), REFERENCE) == README
    with pytest.raises(UserError, match="claims"):
        fill(README.replace("<!-- claims -->", ""), REFERENCE)


def test_files_that_the_readme_links_to_exist() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (PROJECT_ROOT / target).exists(), target


def test_sections_that_the_readme_links_to_exist() -> None:
    links = re.findall(r"\]\(([^)#:]+)#([^)]+)\)", README)
    assert len(links) >= 5
    for target, anchor in links:
        headings = re.findall(r"^#+ (.+)$", (PROJECT_ROOT / target).read_text(encoding="utf-8"), re.MULTILINE)
        assert anchor in {heading.lower().replace(" ", "-") for heading in headings}, (target, anchor)


def test_loss_snippet_runs_in_a_loop_of_the_readers_own(tmp_path: Path) -> None:
    snippet = next(code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "DRSoftmaxLoss" in code)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
    before = model[1].weight.detach().clone()
    loader = [(torch.rand(8, 1, 2, 2), torch.arange(8) % 3)]
    names = {"model": model, "loader": loader, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}
    exec(compile(snippet, "README.md", "exec"), names)
    assert not torch.equal(model[1].weight, before)


def test_readme_names_the_two_commands() -> None:
    for command in ("make reproduce", "make test"):
        assert command in README
