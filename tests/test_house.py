"""The house: who may import whom, how long files and functions are, and that nothing of ours is hidden from a reader."""

import ast

import pytest
from conftest import HERE

LEVELS = (  # a file imports from the levels below it only
    {"guidance", "model", "teacher", "augment", "plumbing.files"},
    {"plumbing.images", "plumbing.counting", "plumbing.usual"},
    {"data", "plumbing.devices"},
    {"plumbing.runs"},
    {"plumbing.options"},
    {"train", "plot"},
    {"predict", "bench"},
)
FILES = {
    f"{path.relative_to(HERE).with_suffix('')}".replace("/", "."): path
    for path in [*HERE.glob("*.py"), *HERE.glob("plumbing/*.py")]
    if path.name != "test_guidance.py"
}
LENGTHS = {"guidance": 150, "train": 300, "model": 145, "teacher": 125, "test_guidance": 500}


def imports_of(path):
    """Our own modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & FILES.keys()


@pytest.mark.parametrize("name", FILES)
def test_imports_go_down_only(name):
    (level,) = (i for i, names in enumerate(LEVELS) if name in names)
    below = set().union(*LEVELS[:level])
    extra = {"plot"} if name == "predict" else set()  # which draws for it
    assert imports_of(FILES[name]) <= below | extra
    if name in ("guidance", "model", "teacher", "augment", "plumbing.files"):
        assert not imports_of(FILES[name])


@pytest.mark.parametrize("name", LENGTHS)
def test_the_methods_files_are_short_enough_to_be_read(name):
    assert len((HERE / f"{name}.py").read_text().splitlines()) <= LENGTHS[name]


@pytest.mark.parametrize(
    "path", [*FILES.values(), *HERE.glob("tests/*.py"), HERE / "test_guidance.py"], ids=str
)
def test_no_function_is_longer_than_a_screen(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name
