-- The ledger: what was done to the shards of this database, and in which state each flag is.
--
-- Every table is keyed by shard, for one database may hold many (a shard may be a schema). Application roles read
-- `shard` and `flag` inside their own transactions; columns of those two never change, since an ALTER would queue every
-- BEGIN: new needs get new tables. What stands in braces is filled in from shardmig.states. This is version 1; what
-- comes after it stands in files of its own (shardmig.ledger.STEPS).

CREATE SCHEMA shardmig;
COMMENT ON SCHEMA shardmig IS 'shardmig: per-shard version flags and the ledger of applied migrations';

---------------------------------------------------------------------------------------------------------------------
-- Read by application code

CREATE TABLE shardmig.shard (
    shard         text PRIMARY KEY,
    epoch         bigint NOT NULL,
    maintenance   smallint NOT NULL DEFAULT 0 CHECK (maintenance BETWEEN 0 AND 2),
    reason        text,
    retry_after_s int NOT NULL DEFAULT 30 CHECK (retry_after_s > 0),
    schema_name   text NOT NULL DEFAULT 'public' UNIQUE
);
COMMENT ON TABLE shardmig.shard IS 'Shards that live in this database: the name is the identity, checked by every transaction';
COMMENT ON COLUMN shardmig.shard.epoch IS 'Random token, drawn anew whenever a flag of the shard changes; a counter would repeat after a failover';
COMMENT ON COLUMN shardmig.shard.maintenance IS '0 none, 1 read-only, 2 offline';
COMMENT ON COLUMN shardmig.shard.reason IS 'Why the shard is in maintenance';
COMMENT ON COLUMN shardmig.shard.schema_name IS 'The schema that holds the shard''s tables: one schema, one shard';
COMMENT ON COLUMN shardmig.shard.retry_after_s IS 'Seconds after which a client that met maintenance should try again';

CREATE TABLE shardmig.flag (
    shard        text NOT NULL REFERENCES shardmig.shard ON UPDATE CASCADE,
    flag         text NOT NULL,
    revision     text NOT NULL,
    state        smallint NOT NULL DEFAULT 0 CHECK (state BETWEEN 0 AND 3),
    has_move     boolean NOT NULL,
    cross_table  boolean NOT NULL DEFAULT false,
    touch_source boolean NOT NULL DEFAULT false,
    needs        text[] NOT NULL DEFAULT '{}',
    drained      boolean NOT NULL DEFAULT true,
    new_valid    boolean NOT NULL DEFAULT false,
    old_valid    boolean NOT NULL DEFAULT true,
    epoch        bigint NOT NULL DEFAULT 0,
    changed_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (shard, flag)
);
COMMENT ON TABLE shardmig.flag IS 'One switch a migration; UPDATE of state is lawful or an error, the trigger decides';
COMMENT ON COLUMN shardmig.flag.state IS '0 OLD, 1 DUAL, 2 LIVE, 3 DONE';
COMMENT ON COLUMN shardmig.flag.has_move IS 'Walks OLD-DUAL-LIVE-DONE; false: OLD-LIVE, meaning only that the structure is there';
COMMENT ON COLUMN shardmig.flag.cross_table IS 'The move fills another table than the one it reads';
COMMENT ON COLUMN shardmig.flag.touch_source IS 'The move touches its source rows, so REPEATABLE READ writers retry instead of missing rows';
COMMENT ON COLUMN shardmig.flag.needs IS 'Flags that must be LIVE here before this one leaves OLD';
COMMENT ON COLUMN shardmig.flag.drained IS 'Every transaction that was open at the last flip is over';
COMMENT ON COLUMN shardmig.flag.new_valid IS 'New was moved and checked, and every writer since wrote it';
COMMENT ON COLUMN shardmig.flag.old_valid IS 'Old is fresh: DONE was never visited, or a reverse move was checked';
COMMENT ON COLUMN shardmig.flag.epoch IS 'Token of this flag''s own last flip: a late drain may only vouch for that one';

---------------------------------------------------------------------------------------------------------------------
-- Read and written by runners

CREATE TABLE shardmig.runner (
    shard  text PRIMARY KEY REFERENCES shardmig.shard ON UPDATE CASCADE,
    term   bigint NOT NULL DEFAULT 0,
    holder text,
    since  timestamptz
);
COMMENT ON TABLE shardmig.runner IS 'Whose turn it is to write as runner';
COMMENT ON COLUMN shardmig.runner.term IS 'Raised by every takeover and every reconnect';

CREATE TABLE shardmig.migration (
    shard       text NOT NULL REFERENCES shardmig.shard ON UPDATE CASCADE,
    revision    text NOT NULL,
    position    int NOT NULL,
    flag        text NOT NULL,
    sha256      text NOT NULL,
    plan        text NOT NULL,
    started_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
    finished_at timestamptz,
    started_by  text NOT NULL,
    finished_by text,
    PRIMARY KEY (shard, revision)
);
COMMENT ON TABLE shardmig.migration IS 'Plans begun on a shard, with the text that was executed';
COMMENT ON COLUMN shardmig.migration.position IS 'Place in the history, from 1';
COMMENT ON COLUMN shardmig.migration.sha256 IS 'Hash of everything executed; another plan under the same revision is PlanChanged';

CREATE TABLE shardmig.step (
    shard          text NOT NULL,
    revision       text NOT NULL,
    number         int NOT NULL,
    kind           text NOT NULL CHECK (kind IN ('statement', 'move', 'switch')),
    sha256         text NOT NULL,
    status         text NOT NULL DEFAULT 'PENDING' CHECK (status IN ('PENDING', 'RUNNING', 'DONE', 'FAILED')),
    term           bigint NOT NULL DEFAULT 0,
    attempts       int NOT NULL DEFAULT 0,
    started_at     timestamptz,
    finished_at    timestamptz,
    error          text,
    direction      text CHECK (direction IN ('forward', 'back')),
    bounded_at     timestamptz,
    upto           text[],
    cursor         text[],
    lap            text[],
    rows           bigint NOT NULL DEFAULT 0,
    batches        bigint NOT NULL DEFAULT 0,
    rows_estimated bigint,
    rows_per_s     double precision,
    eta_s          double precision,
    noted_at       timestamptz,
    check_cursor   text[],
    checked_rows   bigint NOT NULL DEFAULT 0,
    checked_at     timestamptz,
    waiting        text,
    paused         text,
    PRIMARY KEY (shard, revision, number),
    FOREIGN KEY (shard, revision) REFERENCES shardmig.migration ON UPDATE CASCADE
);
COMMENT ON TABLE shardmig.step IS 'Steps of the plans; a record commits together with what it records';
COMMENT ON COLUMN shardmig.step.term IS 'The runner that may write this step; 0 after a flip, which fences a running move';
COMMENT ON COLUMN shardmig.step.bounded_at IS 'When the last key to move was read; upto is NULL on an empty table';
COMMENT ON COLUMN shardmig.step.cursor IS 'Key of the last row moved, as text, one element a column';
COMMENT ON COLUMN shardmig.step.lap IS 'Where the move stands in the stretch of keys behind cursor: lap, of how many, rows left, last key, key reached';
COMMENT ON COLUMN shardmig.step.rows_per_s IS 'How fast rows moved, or were compared, lately when the mover last noted it, once a second';
COMMENT ON COLUMN shardmig.step.eta_s IS 'Seconds left at that speed, the check included; NULL when nothing honest can be said';
COMMENT ON COLUMN shardmig.step.noted_at IS 'When that was: an old one means that nobody moves rows';
COMMENT ON COLUMN shardmig.step.check_cursor IS 'Key of the last row checked';
COMMENT ON COLUMN shardmig.step.checked_rows IS 'How many rows that are, about; of no meaning while check_cursor is NULL';
COMMENT ON COLUMN shardmig.step.waiting IS 'Why the move rests at the moment; NULL while it works';
COMMENT ON COLUMN shardmig.step.paused IS 'Why an operator wants the move to rest (shardmig.pause); NULL: go on';

CREATE TABLE shardmig.amendment (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at          timestamptz NOT NULL DEFAULT clock_timestamp(),
    shard       text NOT NULL,
    revision    text NOT NULL,
    sha256      text NOT NULL,
    plan        text NOT NULL,
    reason      text NOT NULL,
    FOREIGN KEY (shard, revision) REFERENCES shardmig.migration ON UPDATE CASCADE
);
COMMENT ON TABLE shardmig.amendment IS 'Plans that were replaced on a shard before they were finished there, word for word';

CREATE TABLE shardmig.log (
    id           bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at           timestamptz NOT NULL DEFAULT clock_timestamp(),
    shard        text NOT NULL,
    action       text NOT NULL,
    flag         text,
    revision     text,
    before       text,
    after        text,
    reason       text,
    session_user_name text NOT NULL DEFAULT session_user,
    os_user      text DEFAULT current_setting('shardmig.os_user', true)
);
COMMENT ON TABLE shardmig.log IS 'Append-only: who switched, took over, amended, set maintenance; from what, to what, when and why';

CREATE FUNCTION shardmig.ledger_version() RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT 1';

CREATE VIEW shardmig.edge (source, target, guard, has_move, invalidates, forgets, taken) AS
    VALUES {edges};
COMMENT ON VIEW shardmig.edge IS 'Every lawful change of a flag';

---------------------------------------------------------------------------------------------------------------------
-- What keeps it true

CREATE FUNCTION shardmig.state_name(state smallint) RETURNS text LANGUAGE sql IMMUTABLE
    AS $$SELECT (ARRAY['OLD', 'DUAL', 'LIVE', 'DONE'])[state + 1]$$;

CREATE FUNCTION shardmig.draw_epoch() RETURNS bigint LANGUAGE sql VOLATILE
    AS $$SELECT uuid_hash_extended(gen_random_uuid(), 0)$$;

-- A flip and its bookkeeping are one UPDATE: whoever writes it, psql at night included, gets all of it or an error.
-- A runner's server process is new, and every expression, table and type it meets here is one more to look up: hence few
-- of them on the ways that all shards go, no view, and no function of the ledger's own.
CREATE FUNCTION shardmig.on_flag_write() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    edge int;
    met boolean;
    other text;
BEGIN
    IF (NEW.shard, NEW.flag, NEW.revision, NEW.has_move) IS DISTINCT FROM (OLD.shard, OLD.flag, OLD.revision, OLD.has_move)
    THEN
        -- The shard was renamed, and this row follows it (ON UPDATE CASCADE): nobody has the old name any more.
        IF NEW.shard <> OLD.shard AND NOT EXISTS (SELECT FROM shardmig.shard s WHERE s.shard = OLD.shard) THEN
            RETURN NEW;
        END IF;
        RAISE EXCEPTION 'flag % of shard %: its identity cannot change', OLD.flag, OLD.shard USING ERRCODE = 'SM002';
    END IF;

    -- A bit may only be earned in the state that can earn it: between two flips, or on the way out of it.
    IF NEW.new_valid > OLD.new_valid OR NEW.old_valid > OLD.old_valid THEN
        IF NEW.new_valid AND NOT OLD.new_valid AND NOT (OLD.state = 1 AND NEW.drained) IS TRUE THEN
            RAISE EXCEPTION 'flag % of shard %: new becomes valid only in DUAL, after the drain', OLD.flag, OLD.shard
                USING ERRCODE = 'SM002';
        END IF;
        IF NEW.old_valid AND NOT OLD.old_valid AND NOT (OLD.state = 2 AND NEW.drained) IS TRUE THEN
            RAISE EXCEPTION 'flag % of shard %: old becomes valid only in LIVE, after the drain', OLD.flag, OLD.shard
                USING ERRCODE = 'SM002';
        END IF;
        -- After a failover, a move that was over may have lost its end: whether each was, its own row says.
        IF EXISTS (
            SELECT FROM shardmig.step s
            WHERE s.shard = OLD.shard AND s.revision = OLD.revision AND s.kind = 'move' AND (s.checked_at IS NULL
                OR s.direction IS DISTINCT FROM CASE OLD.state WHEN 1 THEN 'forward' ELSE 'back' END))
        THEN
            RAISE EXCEPTION 'flag % of shard %: not all rows of % were moved and compared', OLD.flag, OLD.shard,
                OLD.revision USING ERRCODE = 'SM002', HINT = 'apply again';
        END IF;
    END IF;

    IF NEW.state = OLD.state THEN
        IF NEW.epoch <> OLD.epoch THEN
            RAISE EXCEPTION 'the epoch of a flag is drawn by its flip' USING ERRCODE = 'SM002';
        END IF;
        -- Applications keep these two under the shard's epoch: they say when not to write.
        IF (NEW.cross_table, NEW.touch_source) IS DISTINCT FROM (OLD.cross_table, OLD.touch_source) THEN
            UPDATE shardmig.shard SET epoch = shardmig.draw_epoch() WHERE shard = NEW.shard RETURNING epoch INTO NEW.epoch;
            -- W1: who was let in before may miss what is moved now, so he is waited for, and no earlier drain vouches.
            IF NEW.cross_table AND NOT NEW.touch_source THEN
                NEW.drained := false;
            ELSE
                NEW.epoch := OLD.epoch;
            END IF;
        END IF;
        RETURN NEW;
    END IF;

    edge := {edge};
    met := CASE edge {guards} END;
    IF met IS NULL THEN
        RAISE EXCEPTION 'flag % of shard % cannot go from % to %: one edge at a time', OLD.flag, OLD.shard,
            shardmig.state_name(OLD.state), shardmig.state_name(NEW.state) USING ERRCODE = 'SM002';
    END IF;
    IF NOT met THEN
        RAISE EXCEPTION 'flag % of shard % cannot go from % to % yet: %', OLD.flag, OLD.shard,
            shardmig.state_name(OLD.state), shardmig.state_name(NEW.state),
            (SELECT CASE e.guard
                WHEN 'drained' THEN 'transactions older than the last flip may still be open'
                WHEN 'new_valid' THEN 'new was not moved and checked'
                ELSE 'old is stale until a reverse move was checked' END
            FROM shardmig.edge e
            WHERE e.source = OLD.state AND e.target = NEW.state AND e.has_move = OLD.has_move)
            USING ERRCODE = 'SM002', HINT = 'shardmig switch does what is missing first';
    END IF;

    -- Everybody who changes a flag of this shard meets on this row; what follows sees their commits.
    UPDATE shardmig.shard SET epoch = uuid_hash_extended(gen_random_uuid(), 0) WHERE shard = OLD.shard
        RETURNING epoch INTO NEW.epoch;
    IF OLD.state = 0 THEN
        -- A flag is entered together with its plan, hence before the structure that its other states speak of.
        IF EXISTS (SELECT FROM shardmig.step s
            WHERE s.shard = OLD.shard AND s.revision = OLD.revision AND s.kind = 'statement' AND s.status <> 'DONE')
        THEN
            RAISE EXCEPTION 'flag % of shard % cannot leave OLD: the structure of % is not all there', OLD.flag,
                OLD.shard, OLD.revision USING ERRCODE = 'SM002', HINT = 'apply it first';
        END IF;
        IF cardinality(OLD.needs) > 0 THEN
            SELECT n.name INTO other FROM unnest(OLD.needs) AS n (name)
                WHERE NOT EXISTS (SELECT FROM shardmig.flag f
                    WHERE f.shard = OLD.shard AND f.flag = n.name AND f.state >= 2) LIMIT 1;
            IF FOUND THEN
                RAISE EXCEPTION 'flag % of shard % needs % LIVE first', OLD.flag, OLD.shard, other
                    USING ERRCODE = 'SM002';
            END IF;
        END IF;
    ELSIF OLD.state = 2 AND NEW.state < 2 THEN
        SELECT f.flag INTO other FROM shardmig.flag f
            WHERE f.shard = OLD.shard AND f.state > 0 AND OLD.flag = ANY (f.needs) LIMIT 1;
        IF FOUND THEN
            RAISE EXCEPTION 'flag % of shard % cannot leave LIVE: % reads from it; take that one back to OLD first',
                OLD.flag, OLD.shard, other USING ERRCODE = 'SM002';
        END IF;
    END IF;

    NEW.drained := false;
    NEW.changed_at := clock_timestamp();
    NEW.new_valid := NEW.new_valid AND edge NOT IN ({ends_new});
    NEW.old_valid := NEW.old_valid AND edge NOT IN ({ends_old});
    -- term = 0 fences a mover that is between two batches; the row lock waits for one inside a batch.
    IF edge IN ({forgetting}) THEN
        UPDATE shardmig.step SET term = 0, status = 'PENDING', direction = NULL, bounded_at = NULL, upto = NULL,
                cursor = NULL, lap = NULL, check_cursor = NULL, checked_at = NULL, rows = 0, batches = 0, error = NULL,
                waiting = NULL
            WHERE shard = OLD.shard AND revision = OLD.revision AND kind = 'move';
    ELSIF OLD.has_move THEN
        UPDATE shardmig.step SET term = 0, waiting = NULL
            WHERE shard = OLD.shard AND revision = OLD.revision AND kind = 'move';
    END IF;
    -- Whoever takes a flag forward has done the steps of its plan that say so: first to DUAL, last to LIVE.
    IF NEW.state > OLD.state AND NEW.state < 3 THEN
        UPDATE shardmig.step s SET status = 'DONE', error = NULL, attempts = s.attempts + 1,
                started_at = coalesce(s.started_at, clock_timestamp()), finished_at = clock_timestamp()
            WHERE s.shard = OLD.shard AND s.revision = OLD.revision AND s.kind = 'switch' AND s.status <> 'DONE'
                AND (NEW.state = 2 OR s.number = (SELECT min(f.number) FROM shardmig.step f
                    WHERE f.shard = OLD.shard AND f.revision = OLD.revision AND f.kind = 'switch'));
        IF NEW.state = 2 THEN
            UPDATE shardmig.migration m SET finished_at = coalesce(m.finished_at, clock_timestamp()), finished_by =
                    coalesce(m.finished_by, nullif(current_setting('shardmig.holder', true), ''), session_user)
                WHERE m.shard = OLD.shard AND m.revision = OLD.revision AND NOT EXISTS (SELECT FROM shardmig.step s
                    WHERE s.shard = OLD.shard AND s.revision = OLD.revision AND s.status <> 'DONE');
        END IF;
    END IF;
    INSERT INTO shardmig.log (shard, action, flag, revision, before, after, reason)
        VALUES (OLD.shard, 'switch', OLD.flag, OLD.revision, (ARRAY['OLD', 'DUAL', 'LIVE', 'DONE'])[OLD.state + 1],
            (ARRAY['OLD', 'DUAL', 'LIVE', 'DONE'])[NEW.state + 1], nullif(current_setting('shardmig.reason', true), ''));
    PERFORM pg_notify('shardmig', OLD.shard);  -- a hint for dashboards; nothing relies on it
    RETURN NEW;
END $$;

CREATE TRIGGER on_flag_write BEFORE UPDATE ON shardmig.flag
    FOR EACH ROW EXECUTE FUNCTION shardmig.on_flag_write();

CREATE FUNCTION shardmig.refuse_flag() RETURNS trigger LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF TG_OP = 'DELETE' THEN
        RAISE EXCEPTION 'flag % of shard % cannot be deleted: no row would mean OLD', OLD.flag, OLD.shard
            USING ERRCODE = 'SM002';
    END IF;
    RAISE EXCEPTION 'flag % of shard % must begin as OLD', NEW.flag, NEW.shard USING ERRCODE = 'SM002';
END $$;

CREATE TRIGGER never_deleted BEFORE DELETE ON shardmig.flag
    FOR EACH ROW EXECUTE FUNCTION shardmig.refuse_flag();

-- A flag that begins as OLD changes nothing for anybody, for no row is OLD too: no new epoch, no function to compile.
CREATE TRIGGER begins_as_old BEFORE INSERT ON shardmig.flag
    FOR EACH ROW WHEN (NEW.state <> 0 OR NEW.new_valid OR NOT NEW.old_valid)
    EXECUTE FUNCTION shardmig.refuse_flag();

CREATE FUNCTION shardmig.refuse() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% on shardmig.% is not allowed: what it says is never taken back', TG_OP, TG_TABLE_NAME
        USING ERRCODE = 'SM002';
END $$;

CREATE TRIGGER never_emptied BEFORE TRUNCATE ON shardmig.flag
    FOR EACH STATEMENT EXECUTE FUNCTION shardmig.refuse();

CREATE TRIGGER append_only BEFORE DELETE OR TRUNCATE ON shardmig.log
    FOR EACH STATEMENT EXECUTE FUNCTION shardmig.refuse();

CREATE FUNCTION shardmig.refuse_edit() RETURNS trigger LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    -- What a shard did before it was renamed is its own.
    IF to_jsonb(NEW) - 'shard' = to_jsonb(OLD) - 'shard'
       AND NOT EXISTS (SELECT FROM shardmig.shard AS s WHERE s.shard = OLD.shard) THEN
        RETURN NEW;
    END IF;
    RAISE EXCEPTION 'UPDATE on shardmig.log is not allowed: what it says is never taken back' USING ERRCODE = 'SM002';
END $$;

CREATE TRIGGER never_edited BEFORE UPDATE ON shardmig.log
    FOR EACH ROW EXECUTE FUNCTION shardmig.refuse_edit();

---------------------------------------------------------------------------------------------------------------------
-- What runners call: the first write of each recording transaction, one round trip with what it records.
-- The step row is the fence: comparing a term anywhere else would let a batch happen twice.
-- None returns a row of a table: one that gets a column would fail for whoever called it before, in the same session.

CREATE FUNCTION shardmig.hold_turn(of_shard text, my_term bigint)
    RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    -- Shared until the transaction ends: whoever takes over waits for it, then everything here is refused.
    PERFORM FROM shardmig.runner r WHERE r.shard = of_shard AND r.term = my_term FOR SHARE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'another runner took shard % over', of_shard USING ERRCODE = 'SM001';
    END IF;
END $$;

CREATE FUNCTION shardmig.claim_step(of_shard text, of_revision text, of_number int, my_term bigint)
    RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM shardmig.hold_turn(of_shard, my_term);
    -- Waits for the row lock: an in-doubt transaction of the runner before has ended when the cursor is read here.
    UPDATE shardmig.step s SET term = my_term, attempts = attempts + 1, error = NULL,
            status = CASE s.status WHEN 'DONE' THEN 'DONE' ELSE 'RUNNING' END,
            started_at = coalesce(s.started_at, clock_timestamp())
        WHERE s.shard = of_shard AND s.revision = of_revision AND s.number = of_number AND s.term <= my_term;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'another runner took shard % over', of_shard USING ERRCODE = 'SM001';
    END IF;
END $$;

CREATE FUNCTION shardmig.record_step(of_shard text, of_revision text, of_number int, my_term bigint)
    RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    UPDATE shardmig.step s SET status = 'DONE', finished_at = clock_timestamp(), error = NULL,
            attempts = greatest(s.attempts, 1), started_at = coalesce(s.started_at, clock_timestamp())
        WHERE s.shard = of_shard AND s.revision = of_revision AND s.number = of_number
            AND s.term = my_term AND s.status <> 'DONE';
    IF NOT FOUND THEN
        RAISE EXCEPTION 'step % of % on shard % is no longer this runner''s', of_number, of_revision, of_shard
            USING ERRCODE = 'SM001';
    END IF;
END $$;

CREATE FUNCTION shardmig.begin_move(of_shard text, of_revision text, of_number int, my_term bigint,
        to_direction text, last_key text[], estimated bigint)
    RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    UPDATE shardmig.step s SET direction = to_direction, bounded_at = clock_timestamp(), upto = last_key, cursor = NULL,
            lap = NULL, rows = 0, batches = 0, rows_estimated = estimated, check_cursor = NULL, checked_at = NULL
        WHERE s.shard = of_shard AND s.revision = of_revision AND s.number = of_number AND s.term = my_term;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'step % of % on shard % is no longer this runner''s', of_number, of_revision, of_shard
            USING ERRCODE = 'SM001';
    END IF;
    -- W1, W5: the last key was read before this statement. Were it read before the drain, a transaction still acting
    -- on the state before could write rows behind it that nobody moves.
    PERFORM FROM shardmig.flag f
        WHERE f.shard = of_shard AND f.revision = of_revision AND f.drained
            AND f.state = CASE to_direction WHEN 'forward' THEN 1 ELSE 2 END;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'rows of % move % only in %, after the drain', of_revision, to_direction,
            CASE to_direction WHEN 'forward' THEN 'DUAL' ELSE 'LIVE' END USING ERRCODE = 'SM004';
    END IF;
END $$;

CREATE FUNCTION shardmig.record_batch(of_shard text, of_revision text, of_number int, my_term bigint,
        expected text[], reached text[], expected_lap text[], reached_lap text[], moved bigint)
    RETURNS timestamptz LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    UPDATE shardmig.step s SET cursor = reached, lap = reached_lap, rows = s.rows + moved, batches = s.batches + 1
        WHERE s.shard = of_shard AND s.revision = of_revision AND s.number = of_number
            AND s.term = my_term AND s.cursor IS NOT DISTINCT FROM expected AND s.lap IS NOT DISTINCT FROM expected_lap;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'step % of % on shard % is no longer this runner''s', of_number, of_revision, of_shard
            USING ERRCODE = 'SM001';
    END IF;
    RETURN clock_timestamp();  -- the rows are next: their time steers the size of batches
END $$;

CREATE FUNCTION shardmig.record_check(of_shard text, of_revision text, of_number int, my_term bigint,
        expected text[], reached text[], finished boolean)
    RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    UPDATE shardmig.step s SET check_cursor = reached, checked_at = CASE WHEN finished THEN clock_timestamp() END
        WHERE s.shard = of_shard AND s.revision = of_revision AND s.number = of_number
            AND s.term = my_term AND s.check_cursor IS NOT DISTINCT FROM expected;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'step % of % on shard % is no longer this runner''s', of_number, of_revision, of_shard
            USING ERRCODE = 'SM001';
    END IF;
END $$;

-- The moves of a plan are done and one of its two representations is valid: both, or nothing.
CREATE FUNCTION shardmig.record_valid(of_shard text, of_flag text, my_term bigint, to_direction text, of_epoch bigint)
    RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    of_revision text;
BEGIN
    PERFORM shardmig.hold_turn(of_shard, my_term);
    -- The flag first, as a flip does it: whoever flips now waits here, or is waited for and found.
    UPDATE shardmig.flag f SET new_valid = f.new_valid OR to_direction = 'forward',
            old_valid = f.old_valid OR to_direction = 'back'
        WHERE f.shard = of_shard AND f.flag = of_flag AND f.epoch = of_epoch
        RETURNING f.revision INTO of_revision;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'flag % of shard % was switched while rows moved', of_flag, of_shard USING ERRCODE = 'SM004';
    END IF;
    UPDATE shardmig.step s SET status = 'DONE', finished_at = clock_timestamp(), error = NULL
        WHERE s.shard = of_shard AND s.revision = of_revision AND s.kind = 'move' AND s.status <> 'DONE';
END $$;

CREATE FUNCTION shardmig.take_edge(of_shard text, of_flag text, from_state int, to_state int, of_epoch bigint)
    RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    UPDATE shardmig.flag f SET state = to_state
        WHERE f.shard = of_shard AND f.flag = of_flag AND f.state = from_state AND f.epoch = of_epoch;
    IF NOT FOUND THEN
        -- An error, so that nothing recorded together with the flip is kept without it.
        RAISE EXCEPTION 'flag % of shard % was switched by somebody else meanwhile', of_flag, of_shard
            USING ERRCODE = 'SM004';
    END IF;
END $$;

---------------------------------------------------------------------------------------------------------------------
-- What operators call; GRANT EXECUTE to whom you trust with it

CREATE FUNCTION shardmig.only_shard(named text) RETURNS text LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    found_shards text[];
BEGIN
    SELECT array_agg(s.shard ORDER BY s.shard) INTO found_shards FROM shardmig.shard s
        WHERE named IS NULL OR s.shard = named;
    IF cardinality(found_shards) = 1 THEN
        RETURN found_shards[1];
    END IF;
    RAISE EXCEPTION 'name one of the shards of this database: %',
        (SELECT string_agg(s.shard, ', ' ORDER BY s.shard) FROM shardmig.shard s) USING ERRCODE = 'SM002';
END $$;

CREATE FUNCTION shardmig.switch(of_flag text, to_state text, why text, of_shard text DEFAULT NULL) RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    wanted int := array_position(ARRAY['OLD', 'DUAL', 'LIVE', 'DONE'], upper(to_state)) - 1;
    here text := shardmig.only_shard(of_shard);
BEGIN
    IF wanted IS NULL THEN
        RAISE EXCEPTION 'no state %: OLD, DUAL, LIVE or DONE', to_state USING ERRCODE = 'SM002';
    END IF;
    IF wanted = 3 THEN
        -- From here nobody sees whether writers may leave old out, nor whether back(new) is what stands in it.
        RAISE EXCEPTION 'flag % of shard % goes DONE by the command alone, which looks at all rows and old columns first',
            of_flag, here USING ERRCODE = 'SM002', HINT = format('shardmig switch %s DONE --shard %s', of_flag, here);
    END IF;
    PERFORM set_config('shardmig.reason', coalesce(why, ''), true);
    UPDATE shardmig.flag f SET state = wanted WHERE f.shard = here AND f.flag = of_flag;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'shard % has no flag %', here, of_flag USING ERRCODE = 'SM002';
    END IF;
    RETURN format('%s: %s is %s', here, of_flag, upper(to_state));
END $$;
COMMENT ON FUNCTION shardmig.switch IS 'One edge of a flag, e.g. SELECT shardmig.switch(''split_name'', ''DUAL'', ''wrong names'')';

CREATE FUNCTION shardmig.pause(of_flag text, why text, of_shard text DEFAULT NULL) RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    here text := shardmig.only_shard(of_shard);
BEGIN
    UPDATE shardmig.step s SET paused = coalesce(nullif(why, ''), 'no reason given')
        FROM shardmig.flag f
        WHERE f.shard = here AND f.flag = of_flag AND s.shard = here AND s.revision = f.revision AND s.kind = 'move';
    IF NOT FOUND THEN
        RAISE EXCEPTION 'shard % has no flag % with a move (is it to come? apply --until structure, then pause)', here, of_flag
            USING ERRCODE = 'SM002';
    END IF;
    INSERT INTO shardmig.log (shard, action, flag, reason) VALUES (here, 'pause', of_flag, why);
    RETURN format('%s: the move of %s rests', here, of_flag);
END $$;
COMMENT ON FUNCTION shardmig.pause IS 'Let a running move rest within a second or so, until shardmig.resume';

CREATE FUNCTION shardmig.resume(of_flag text, of_shard text DEFAULT NULL) RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    here text := shardmig.only_shard(of_shard);
BEGIN
    UPDATE shardmig.step s SET paused = NULL
        FROM shardmig.flag f
        WHERE f.shard = here AND f.flag = of_flag AND s.shard = here AND s.revision = f.revision AND s.kind = 'move';
    IF NOT FOUND THEN
        RAISE EXCEPTION 'shard % has no flag % with a move', here, of_flag USING ERRCODE = 'SM002';
    END IF;
    INSERT INTO shardmig.log (shard, action, flag) VALUES (here, 'resume', of_flag);
    RETURN format('%s: the move of %s goes on', here, of_flag);
END $$;
COMMENT ON FUNCTION shardmig.resume IS 'Let a paused move go on';

-- A runner that closes a shard by itself names the revision it is for: whoever finds that in the log may lift it.
CREATE FUNCTION shardmig.maintenance(mode text, why text, of_shard text DEFAULT NULL, for_revision text DEFAULT NULL)
    RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    wanted int := array_position(ARRAY['off', 'read-only', 'offline'], lower(mode)) - 1;
    here text := shardmig.only_shard(of_shard);
    before int;
BEGIN
    IF wanted IS NULL THEN
        RAISE EXCEPTION 'no mode %: off, read-only or offline', mode USING ERRCODE = 'SM002';
    END IF;
    SELECT s.maintenance INTO before FROM shardmig.shard s WHERE s.shard = here FOR UPDATE;
    UPDATE shardmig.shard s SET maintenance = wanted, reason = CASE WHEN wanted > 0 THEN why END WHERE s.shard = here;
    INSERT INTO shardmig.log (shard, action, revision, before, after, reason)
        VALUES (here, 'maintenance', for_revision, (ARRAY['off', 'read-only', 'offline'])[before + 1], lower(mode), why);
    RETURN format('%s: maintenance %s', here, lower(mode));
END $$;
COMMENT ON FUNCTION shardmig.maintenance IS 'Maintenance off, read-only or offline; drain afterwards before relying on it';

---------------------------------------------------------------------------------------------------------------------
-- Rights: flags hold no secret, and one forgotten role would fail every transaction

GRANT USAGE ON SCHEMA shardmig TO PUBLIC;
GRANT SELECT ON shardmig.shard, shardmig.flag, shardmig.edge TO PUBLIC;
REVOKE EXECUTE ON ALL FUNCTIONS IN SCHEMA shardmig FROM PUBLIC;
GRANT EXECUTE ON FUNCTION shardmig.ledger_version(), shardmig.state_name(smallint) TO PUBLIC;
