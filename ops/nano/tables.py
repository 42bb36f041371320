"""An evaluation of nano as Markdown, for the card and ops/docs/nano.md."""

SOURCES = ("exact", "patches", "tokens")  # of pre-fusion


def markdown(result: dict) -> str:
    """The evaluation as tables."""
    parts = []
    for name, title in (("moment", "about a moment"), ("time", "over time, 8 frames")):
        rows = result["accuracy"][name]
        columns = [column for column in rows["all"] if column != "questions"]
        parts.append(f"| {title} | questions | {' | '.join(columns)} |")
        parts.append(f"|---|{'---:|' * (len(columns) + 1)}")
        for kind, row in rows.items():
            cells = " | ".join(f"{row[column]:.1f}" for column in columns)
            parts.append(f"| {kind} | {row['questions']} | {cells} |")
        parts.append("")
    found, real, speed = result["retrieval"], result["real"], result["speed"]
    parts += [
        "| what | value | yardstick |",
        "|---|---:|---:|",
        f"| whole caption → frame, best of {found['scenes']} scenes right | {found['captions_r1']:.1f} % "
        f"| at random {found['captions_random']:.1f} % |",
        f"| single word → frame, best of {found['scenes']} scenes right | {found['words_r1']:.1f} % "
        f"| at random {found['words_random']:.1f} % |",
        f"| real clips: moments in which it claims a pictogram | {real.get('claims_percent', 0):.1f} % | |",
        f"| size | {speed['megabytes']:.1f} MB | |",
        f"| encoding, {speed['threads']} threads | {speed['frames_per_second']} frames/s | |",
        f"| first word of an answer about one frame, from its pixels | {speed['first_word_seconds']:.3f} s | |",
    ]
    return "\n".join(parts)
