"""Write the table of mechanisms and backbones into the README, from the registries.

    python scripts/write_pairs_table.py

Between two comments under "What works"; `tests/stages/test_pairs.py` fails where it is out of date.
"""

from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"


def main() -> None:
    from linearize.stages.pairs import pairs_table, with_table

    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
    print(pairs_table())


if __name__ == "__main__":
    main()
