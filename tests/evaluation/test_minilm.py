"""A real encoder on the demo text: attention transfer alone brings all-MiniLM-L6-v2's embeddings back."""

from pathlib import Path

import pytest

import linearize

DEMO_TEXT = Path(linearize.__file__).parent / "demo_text"


@pytest.mark.slow
def test_a_few_steps_of_transfer_bring_the_embeddings_back(minilm, tmp_path):
    result = linearize.run(
        {
            "model_name_or_path": str(minilm),
            "output_dir": str(tmp_path / "out"),
            "device": "cpu",
            "attention": {"type": "linear", "window": 4, "sinks": 1},
            "data": {
                "dataset": str(DEMO_TEXT / "train.jsonl.gz"),
                "validation": str(DEMO_TEXT / "validation.jsonl.gz"),
                "sequence_length": 48,
                "sentences_per_row": 2,
                "max_tokens": 20_000,
                "cache_dir": str(tmp_path / "cache"),
            },
            "stages": {"transfer": {"kind": "transfer", "max_steps": 24, "batch_size": 16, "tokens_per_step": 768}},
            "evaluation": {"pairs": 24},
        }
    )
    figures = {row.name: row for row in result.report.rows}
    assert figures["student after conversion"].cosine < 0.92
    assert figures["student"].cosine > 0.94  # 0.972 after 30 steps of 1024
    assert figures["student"].rank_correlation > figures["student after conversion"].rank_correlation
    names = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "1_Pooling/config.json")
    assert all((result.final / name).read_bytes() == (minilm / name).read_bytes() for name in names)
    assert linearize.load_student(result.final).config.model_type == "linearized_bert"
