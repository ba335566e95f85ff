"""lm-eval's own command with the model ``bimamba``: ``python -m bimamba_lit.eval.lm_eval_main --model bimamba …``.

Releases of lm-eval after 0.4.13 find the model by this package's entry point, so that there ``lm_eval`` itself does.
"""

from lm_eval.__main__ import cli_evaluate

import bimamba_lit.eval.lm_eval_adapter  # noqa: F401  registers the model

if __name__ == "__main__":
    cli_evaluate()
