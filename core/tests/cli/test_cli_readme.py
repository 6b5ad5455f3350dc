"""The README tells the truth: its tables are generated, its example runs, its commands and links lead somewhere."""

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from polydraft._plugins import default_host
from polydraft._registry.backends import known_backends

ROOT = Path(__file__).parents[3]
README = ROOT / "README.md"

pytestmark = pytest.mark.skipif(not README.is_file(), reason="the repository's README is not available")


def rows(text):
    return {line for line in text.splitlines() if line.startswith("| `")}


@pytest.fixture(scope="module")
def script():
    """What writes the table."""
    spec = importlib.util.spec_from_file_location("ci_readme", ROOT / "ci/readme.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "ci")  # as for ``python ci/readme.py``
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def table(script):
    begin, end = script.marks("backends")
    return script.BACKENDS_PAGE.read_text(encoding="utf-8").partition(begin)[2].partition(end)[0]


def test_the_table_is_what_the_backends_declare(script, table):
    # Only what is installed can be compared.
    assert rows(script.backends_table()) <= rows(table), "run `nox -s readme`"


def test_the_table_of_speeds_is_what_was_measured(script):
    text = README.read_text(encoding="utf-8")
    assert script.filled(text, "speed", script.speed_table()) == text, "run `nox -s readme`"


def test_every_backend_of_the_table_can_be_asked_for(table):
    """Installed or not: else asking for it by name would not say how to get it."""
    listed = {row.split("`")[1] for row in rows(table)}
    assert listed
    assert listed <= {known.name for known in known_backends()}


@pytest.mark.parametrize("file", sorted(path.name for path in ROOT.glob("*.md")))
def test_links_lead_somewhere(file):
    text = (ROOT / file).read_text(encoding="utf-8")
    targets = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    for target in targets:
        path, _, anchor = target.partition("#")
        there = ROOT / path if path else ROOT / file
        assert there.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", there.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, target


def builtin_pair_runs():
    host = default_host()
    return "tiny-e2b" in host.local_models() and "transformers" in host.backends()


# ray_data_batch.py takes a cluster and an engine for batches: plugins/vllm/long_tests runs it.
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py") if path.name != "ray_data_batch.py")

ARGUMENTS = {
    "two_engines.py": ["transformers", "transformers"],
    # Its engine starts in no time.
    "survive_a_crash.py": ["builtin:toy"],
}
TYPED = "no-such-engine\nreference\ntransformers\nimport os\n"
"""The input of choose_engine.py."""


def readme_example():
    """The README's, with the built-in model."""
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert code.count("google/gemma-4-E4B-it") == 1
    small = code.replace("google/gemma-4-E4B-it", "builtin:tiny-e2b").replace("max_new_tokens=256", "max_new_tokens=20")
    return small.replace("seed=1", "seed=1, max_new_tokens=20")


def notebook_cells():
    """The code of the notebook; what a cell ends with is shown as a notebook would."""
    cells = json.loads((ROOT / "examples/speculative_decoding.ipynb").read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert len(sources) > 5
    code = []
    for source in sources:
        *body, last = ast.parse(source).body
        code += [*map(ast.unparse, body)]
        code.append(f"print(({ast.unparse(last)})._repr_html_())" if is_shown(last) else ast.unparse(last))
    return "\n".join(code)


def is_shown(last):
    return isinstance(last, ast.Expr) and ast.unparse(last) != "session.close()"


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """What each script prints. One process runs them all: importing an engine takes longer than any of them."""
    if not builtin_pair_runs():
        pytest.skip("needs polydraft-transformers and polydraft-builtin-pairs")
    readme = tmp_path_factory.mktemp("readme") / "README.md"
    readme.write_text(readme_example(), encoding="utf-8")
    notebook = readme.with_name("notebook.py")
    notebook.write_text(notebook_cells(), encoding="utf-8")
    scripts = [
        [str(readme)],
        [str(notebook)],
        *([str(ROOT / "examples" / name), *ARGUMENTS.get(name, ())] for name in EXAMPLES),
    ]
    code = (
        f"import runpy, sys\nfor sys.argv in {scripts!r}:\n"
        "    runpy.run_path(sys.argv[0], run_name='__main__')\n    print('\\f')"
    )
    variables = {**os.environ, "POLYDRAFT_DATA_DIR": str(readme.parent)}  # the user's own engines are not for tests
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, input=TYPED, env=variables, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return dict(zip(["README.md", "notebook", *EXAMPLES], done.stdout.split("\f\n"), strict=False))


def test_the_example_of_the_readme(printed):
    # Acceptance rate and mean acceptance length; None where the small model ends before a draft was made.
    assert re.search(r"(None|[01]\.\d+) (None|\d\.\d+)", printed["README.md"])


def test_the_notebook(printed):
    shown = printed["notebook"]
    assert shown.count("<table>") >= 5
    assert 'title="accepted draft"' in shown
    assert re.search(r"<Chunk '.*': \d+ tokens?, \d accepted drafts", shown)


@pytest.mark.parametrize("file", EXAMPLES)
def test_examples(file, printed):
    assert printed[file].strip()
    if file == "generate.py":
        assert "identical: True" in printed[file]
    elif file == "choose_engine.py":
        assert "There is no backend 'no-such-engine'" in printed[file]
        assert "The backend reference cannot load builtin:tiny-e2b" in printed[file]
        assert re.search(r"transformers \S+ in this process: .*\nPrompt: import os\n.", printed[file])
    elif file == "two_engines.py":
        _, one, other = printed[file].split("--- ")
        assert one == other
        assert one.startswith("transformers ")
        assert len(one) > 100
    elif file == "survive_a_crash.py":
        assert re.search(r"--- The worker of reference \(process \d+\) was ended by SIGKILL", printed[file])
        assert "--- A new one goes on:\ndef read_lines(path):\n" in printed[file]
