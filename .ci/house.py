"""Checks the house: sizes of files and functions, lines of code in all, and that no import points up."""
import ast
import io
import sys
import tokenize
from pathlib import Path

MOST_LINES, MOST_IN_FUNCTION, MOST_CODE = 300, 50, 3625
LONGER = {"pretrain.py": 350}
SCRIPTS, GROUND = {"pretrain", "finetune"}, {"masking", "contrastive", "transformer", "dalle"}  # import only plumbing


def lines_of_code(source, tree):
    """Lines that are not blank, comment or docstring."""
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    lines = {line for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type not in skipped
             for line in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def imported(tree):
    """The modules that a file imports anywhere."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]


def main():
    top, total, faults = {path.stem for path in Path().glob("*.py")}, 0, []
    for path in sorted([*Path().glob("*.py"), *Path("plumbing").rglob("*.py")]):
        source = path.read_text()
        tree, count = ast.parse(source), len(source.splitlines())
        code = lines_of_code(source, tree)
        total += code
        print(f"{path!s:28} {count:4} lines {code:4} of code")
        if count > LONGER.get(str(path), MOST_LINES):
            faults.append(f"{path}: {count} lines, {LONGER.get(str(path), MOST_LINES)} at most")
        faults += [f"{path}: {node.name} has {node.end_lineno - node.lineno + 1} lines, {MOST_IN_FUNCTION} at most"
                   for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)
                   and node.end_lineno - node.lineno + 1 > MOST_IN_FUNCTION]
        for name in set(imported(tree)) & (top - {path.stem}):
            below = path.parts[0] == "plumbing" or path.stem in GROUND or name in SCRIPTS
            if below or (path.stem == "data" and name != "plumbing"):
                faults.append(f"{path} imports {name}: imports point down only")
    print(f"{'all':28} {'':10} {total:4} of code")
    if total > MOST_CODE:
        faults.append(f"{total} lines of code, {MOST_CODE} at most")
    for fault in faults:
        print(fault, file=sys.stderr)
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
