"""Texts that tokenizers stumble over: many scripts, emoji, code, spaces, control characters, special tokens' texts."""

import random

SAMPLES = [
    "The quick brown fox jumps over the lazy dog.",
    "It's they're we'll I'D He'S '\u017f \u02bcs \u2019s 'Ve''ll",
    "def f(x):\n    return x**2  # square\n\n\tif a != b: {}", "SELECT * FROM t WHERE a='b';--\r\n\r\n", "https://a.b/c?d=e&f#g",
    "Zażółć gęślą jaźń", "Съешь ещё этих мягких французских булок", "İstanbul ǅ ﬁ ß ẞ Ωμέγα",
    "敏捷的棕色狐狸跳过了懒狗。", "いろはにほへと ちりぬるを", "한국어 문장입니다", "ไทยไม่มีช่องว่าง",
    "مرحبا بالعالم", "שלום עולם", "हिन्दी में लिखा हुआ", "አማርኛ ᏣᎳᎩ ܣܘܪܝܝܐ",
    "👩‍👩‍👧‍👦 🇫🇷 👍🏽 🤖 ☺️ 1️⃣",
    "3.14159 1,000,000 ½ ² Ⅷ ٣٤ 12345678901 \U0001d7d8\U0001d7d9 ੧੨੩",
    "   leading", "trailing   ", "a  b   c    d", "\n\n\n", "\r\n\t \t", " ", "",
    "e\u0301 \u00a0 \u2003 \u200b \u3000\u1680\u180e",
    "\x01\x02\x00\x7f\x85 \x0b\x0c\x1c\x1d\x1e\x1f \u2028\u2029 \ufeff\ufffd\U0010ffff",
    "x" * 300, "aba" * 40, "hahah" * 9, "ab" * 50 + "a", "=" * 81 + " " * 81 + "\n" * 17 + "-" * 33,
    "$$$ ^_^ ~~~ ||| +++ <<>> ▁ ▁▁a a▁b Ġ Ċ", "<0x0A> <0x41>",
    "<s></s><unk>", "[INST] <<SYS>>\n<</SYS>> [/INST]", "<|im_start|>user\n<|im_end|><|endoftext|>",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>",
]  # fmt: skip


def strings(count: int, seed: int = 0) -> list[str]:
    """SAMPLES, and mixtures of their parts with random characters of every script."""
    rng = random.Random(seed)

    def part() -> str:
        if rng.random() < 0.3:
            planes = [rng.randrange(32, 127), rng.randrange(0x20, 0xD800), rng.randrange(0x10000, 0x30000)]
            return chr(rng.choice(planes)) * rng.randrange(1, 4)
        sample = rng.choice(SAMPLES)
        start = rng.randrange(len(sample) + 1)
        return sample[start : start + rng.randrange(1, 12)]

    return SAMPLES + ["".join(part() for _ in range(rng.randrange(1, 12))) for _ in range(count - len(SAMPLES))]
