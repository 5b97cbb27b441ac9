"""Fine-tuning of text encoders: `shoal encoder train`.

    pairs ─data.py─▶ batches ─passes.py─▶ vectors ─loss.py─▶ gradients ─loop.py─▶ a better model
                                                              │
       metrics.py, gate.py judge it · report.py shows it · checkpoints.py keeps it · saving.py hands it on

`data.py`, `loss.py`, `metrics.py` and `gate.py` take values and give values. `loop.py` is the driver:
data × pipeline × tensor parallel on the mesh that serving uses too.
"""
