"""Write a torch_dist checkpoint as a Hugging Face folder, by the command lines of slime; `qwench convert` does the same.

python tools/convert_torch_dist_to_hf.py --input-dir run/iter_0000020 --output-dir out --origin-hf-dir Qwen3-4B [-f]
"""

from __future__ import annotations

from qwench.cli import main
from qwench.commands.convert import convert_torch_dist_to_hf

if __name__ == "__main__":
    main(command=convert_torch_dist_to_hf)
