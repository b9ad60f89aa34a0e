import re

from tests.readme import ROOT, read_block, render_blocks

README = (ROOT / "README.md").read_text()


def test_measured_blocks_are_the_committed_results() -> None:
    for name, content in render_blocks().items():
        assert read_block(README, name) == content, f"run python -m tests.readme ({name})"


def test_links_and_pictures_exist() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    assert targets
    for target in targets:
        if "://" not in target:
            assert (ROOT / target).exists(), target


def test_named_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"(?:^|`)make ([a-z]+)", README, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
