"""`sptc bench` and `sptc.bench`: dense and sparse training steps of any model, checked and compared."""
