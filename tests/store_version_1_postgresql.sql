-- What the first release makes of an empty PostgreSQL database: a store of schema version 1.
CREATE TABLE alarms (
    id BIGSERIAL NOT NULL,
    dedupe_key VARCHAR(255) NOT NULL,
    kind VARCHAR(32) NOT NULL,
    severity VARCHAR(16) NOT NULL,
    raised_at BIGINT NOT NULL,
    model_version VARCHAR(64),
    message TEXT NOT NULL,
    detail JSON NOT NULL,
    acknowledged_at BIGINT,
    acknowledged_by VARCHAR(255),
    CONSTRAINT pk_alarms PRIMARY KEY (id),
    CONSTRAINT uq_alarms_dedupe_key UNIQUE (dedupe_key)
);
CREATE TABLE api_keys (
    id VARCHAR(64) NOT NULL,
    name VARCHAR(255) NOT NULL,
    key_hash VARCHAR(64) NOT NULL,
    role VARCHAR(16) NOT NULL,
    created_at BIGINT NOT NULL,
    revoked_at BIGINT,
    CONSTRAINT pk_api_keys PRIMARY KEY (id),
    CONSTRAINT uq_api_keys_key_hash UNIQUE (key_hash)
);
CREATE TABLE approvals (
    id BIGSERIAL NOT NULL,
    model_version VARCHAR(64) NOT NULL,
    decision VARCHAR(16) NOT NULL,
    approver VARCHAR(255) NOT NULL,
    reason TEXT NOT NULL,
    gate JSON NOT NULL,
    decided_at BIGINT NOT NULL,
    CONSTRAINT pk_approvals PRIMARY KEY (id)
);
CREATE INDEX ix_approvals_model_version ON approvals (model_version);
CREATE TABLE audit (
    id BIGINT NOT NULL,
    at BIGINT NOT NULL,
    actor VARCHAR(255) NOT NULL,
    action VARCHAR(64) NOT NULL,
    subject VARCHAR(255) NOT NULL,
    detail JSON NOT NULL,
    previous_hash VARCHAR(64) NOT NULL,
    hash VARCHAR(64) NOT NULL,
    CONSTRAINT pk_audit PRIMARY KEY (id),
    CONSTRAINT uq_audit_hash UNIQUE (hash)
);
CREATE TABLE drift_reports (
    id BIGSERIAL NOT NULL,
    window_start BIGINT NOT NULL,
    window_end BIGINT NOT NULL,
    model_version VARCHAR(64) NOT NULL,
    reference VARCHAR(64) NOT NULL,
    label_watermark BIGINT NOT NULL,
    status VARCHAR(16) NOT NULL,
    num_rows BIGINT NOT NULL,
    num_groups BIGINT NOT NULL,
    alarm BOOLEAN NOT NULL,
    drifted JSON NOT NULL,
    statistics JSON NOT NULL,
    input_digest VARCHAR(64) NOT NULL,
    report TEXT,
    created_at BIGINT NOT NULL,
    CONSTRAINT pk_drift_reports PRIMARY KEY (id),
    CONSTRAINT uq_drift_reports_window_start_window_end_model_version__474e UNIQUE (window_start, window_end, model_version, reference, label_watermark)
);
CREATE TABLE images (
    hash VARCHAR(64) NOT NULL,
    suffix VARCHAR(8) NOT NULL,
    num_bytes BIGINT NOT NULL,
    stored_at BIGINT NOT NULL,
    CONSTRAINT pk_images PRIMARY KEY (hash)
);
CREATE TABLE labels (
    id BIGSERIAL NOT NULL,
    prediction_id VARCHAR(64) NOT NULL,
    label VARCHAR(64) NOT NULL,
    malignant BOOLEAN NOT NULL,
    labeller VARCHAR(255) NOT NULL,
    labelled_at BIGINT NOT NULL,
    confidence FLOAT,
    comment TEXT,
    supersedes BIGINT,
    CONSTRAINT pk_labels PRIMARY KEY (id)
);
CREATE INDEX ix_labels_prediction_id ON labels (prediction_id);
CREATE TABLE predictions (
    id VARCHAR(64) NOT NULL,
    idempotency_key VARCHAR(255),
    received_at BIGINT NOT NULL,
    acquired_at BIGINT,
    caller VARCHAR(255) NOT NULL,
    role VARCHAR(16) NOT NULL,
    patient_hmac VARCHAR(64),
    institution VARCHAR(255),
    device VARCHAR(255),
    image_hash VARCHAR(64),
    model_version VARCHAR(64) NOT NULL,
    context VARCHAR(16) NOT NULL,
    metadata JSON NOT NULL,
    image_score FLOAT,
    class_probabilities JSON,
    risk FLOAT,
    band VARCHAR(16),
    threshold FLOAT,
    abstained BOOLEAN NOT NULL,
    reasons JSON NOT NULL,
    brightness FLOAT,
    contrast FLOAT,
    blur FLOAT,
    red FLOAT,
    green FLOAT,
    blue FLOAT,
    embedding BYTEA,
    stage_ms JSON NOT NULL,
    CONSTRAINT pk_predictions PRIMARY KEY (id),
    CONSTRAINT uq_predictions_caller_idempotency_key UNIQUE (caller, idempotency_key)
);
CREATE INDEX ix_predictions_patient_hmac ON predictions (patient_hmac);
CREATE INDEX ix_predictions_role_received_at ON predictions (role, received_at);
CREATE TABLE retrain_requests (
    id VARCHAR(64) NOT NULL,
    dedupe_key VARCHAR(255) NOT NULL,
    trigger VARCHAR(32) NOT NULL,
    reason TEXT NOT NULL,
    requested_by VARCHAR(255) NOT NULL,
    requested_at BIGINT NOT NULL,
    state VARCHAR(16) NOT NULL,
    attempt INTEGER NOT NULL,
    leased_until BIGINT,
    job_id VARCHAR(255),
    model_version VARCHAR(64),
    detail JSON NOT NULL,
    finished_at BIGINT,
    CONSTRAINT pk_retrain_requests PRIMARY KEY (id),
    CONSTRAINT uq_retrain_requests_dedupe_key UNIQUE (dedupe_key)
);
CREATE TABLE schema_version (
    version INTEGER NOT NULL,
    CONSTRAINT pk_schema_version PRIMARY KEY (version)
);
CREATE TABLE submissions (
    id VARCHAR(64) NOT NULL,
    idempotency_key VARCHAR(255),
    caller VARCHAR(255) NOT NULL,
    state VARCHAR(16) NOT NULL,
    submitted_at BIGINT NOT NULL,
    leased_until BIGINT,
    attempts INTEGER NOT NULL,
    request JSON NOT NULL,
    result JSON,
    error TEXT,
    finished_at BIGINT,
    CONSTRAINT pk_submissions PRIMARY KEY (id),
    CONSTRAINT uq_submissions_caller_idempotency_key UNIQUE (caller, idempotency_key)
);
CREATE INDEX ix_submissions_state ON submissions (state);
INSERT INTO schema_version VALUES (1);
