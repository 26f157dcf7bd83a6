"""Runs every notebook from top to bottom and compares its output with what is committed.

    python .ci/notebooks.py FOLDER      writes the executed copies there

Faults are: an error, a warning or anything else on stderr, execution counts that are not 1..n, a
file above 2 MB, a function or class named like one of the project's, and a printed number that
differs from the committed one. Cells tagged `trained` print results of training, which differ a
little between machines: their numbers may differ by a quarter, or by two units of the last digit.
Cells tagged `varies` (versions, single tokens) are not compared.
"""
import ast
import copy
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

MOST_BYTES = 2 * 2**20


def project_names():
    """Functions and classes of the project's modules."""
    for path in [*Path().glob("*.py"), *Path("plumbing").glob("*.py")]:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name != "main":
                yield node.name


def printed(cell):
    return "".join(output.text for output in cell.outputs
                   if output.output_type == "stream" and output.name == "stdout")


def numbers(text):
    return re.findall(r"(?<![\w.])-?\d[\d,]*\.?\d*", text)


def alike(before, now, trained):
    """Whether two printed numbers are the same, or near enough."""
    if before == now:
        return True
    a, b = (float(number.replace(",", "")) for number in (before, now))
    last_digit = 10.0 ** -len(before.partition(".")[2])
    tolerance = 1.01 * last_digit if "." in before else 0
    if trained:
        tolerance = max(0.25 * abs(a), 2 * last_digit)
    return abs(a - b) <= tolerance


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def check_committed(path, cells):
    """-> the faults of a notebook as it is committed [str]."""
    faults = []
    if path.stat().st_size > MOST_BYTES:
        faults.append(f"{path.stat().st_size} bytes, {MOST_BYTES} at most")
    if [cell.execution_count for cell in cells] != list(range(1, len(cells) + 1)):
        faults.append("its cells were not run once, from top to bottom")
    names = set(project_names())
    for cell in cells:
        defined = re.findall(r"^\s*(?:def|class) (\w+)", cell.source, re.MULTILINE)
        faults += [f"defines {name} a second time" for name in sorted(names & set(defined))]
    return faults


def check_cell(number, before, now):
    """-> the faults of a cell that was run again [str]."""
    tags = before.metadata.get("tags", [])
    noise = [output.text for output in [*before.outputs, *now.outputs]
             if output.get("name") == "stderr"]
    faults = [f"cell {number} writes to stderr: {text.strip()[:200]}" for text in noise]
    old, new = numbers(printed(before)), numbers(printed(now))
    same = len(old) == len(new) and all(alike(a, b, "trained" in tags) for a, b in zip(old, new))
    if not same and "varies" not in tags:
        faults.append(f"cell {number} prints\n{printed(now)}where this is committed:\n"
                      f"{printed(before)}")
    return faults


def check(path, out):
    """Runs a notebook and saves the executed copy in the folder `out` -> its faults [str]."""
    committed = nbformat.read(path, as_version=4)
    faults = check_committed(path, code_cells(committed))
    fresh = copy.deepcopy(committed)
    folder = {"metadata": {"path": str(path.parent)}}
    NotebookClient(fresh, timeout=600, resources=folder).execute()
    nbformat.write(fresh, Path(out) / path.name)
    cells = zip(code_cells(committed), code_cells(fresh))
    for number, (before, now) in enumerate(cells, start=1):
        faults += check_cell(number, before, now)
    return faults


def main():
    wrong = False
    for path in sorted(Path("notebooks").glob("*.ipynb")):
        start = time.perf_counter()
        faults = check(path, sys.argv[1])
        print(f"{path}: {time.perf_counter() - start:.0f} s", flush=True)
        for fault in faults:
            print(f"  {fault}", file=sys.stderr)
        wrong |= bool(faults)
    sys.exit(wrong)


if __name__ == "__main__":
    main()
