-- Orders, and the audit of whatever operators do. docs/protocol.rst, "Orders" and "Audit", says what they mean.

-- Orders ---------------------------------------------------------------------------------------------------------

-- The row decides: an order runs only by whoever has locked its row while it is open.
create table orders (
    order_id text collate "C" primary key default gen_random_uuid()::text check (order_id ~ '^[A-Za-z0-9_-]{1,64}$'),
    rpc text not null,
    params jsonb not null check (jsonb_typeof(params) = 'object'),
    actor text not null default session_user,
    idem_key text collate "C" unique check (idem_key ~ '^[ -~]{1,200}$'),
    status text not null default 'queued' check (status in ('queued', 'running', 'done', 'refused', 'failed')),
    result jsonb check (jsonb_typeof(result) = 'object'),
    state jsonb check (jsonb_typeof(state) = 'object'), -- where one that runs goes on, and how far it is
    attempts integer not null default 0, -- begun in a row without getting on: by processes that died, mostly
    retry_at timestamptz, -- not before, after an attempt
    engine text, -- the name of the one that ran it last
    way text check (way in ('link', 'table')), -- how engines came by it
    -- Within the years that every reader has.
    created_at timestamptz not null default now() check (created_at between '2000-01-01' and '9999-01-01'),
    stepped_at timestamptz not null default now(), -- when it had its turn last
    started_at timestamptz,
    finished_at timestamptz
);
-- In turns: neither does a long order hold up a short one, nor do many short ones a long one.
create index orders_open on orders (stepped_at) where status in ('queued', 'running');
create trigger orders_notify after insert on orders
    for each statement execute function s2s_notify('s2s_orders');

-- Audit ----------------------------------------------------------------------------------------------------------

create table audit (
    audit_id bigint generated always as identity primary key,
    at timestamptz not null default clock_timestamp(),
    actor text not null,
    action text not null,
    subject text not null default '', -- what it was done to: an order_id, a key, an engine's name
    params jsonb not null default '{}',
    result jsonb
);
create index audit_subject on audit (subject, audit_id);

create function s2s_audit_keep() returns trigger language plpgsql as $$
begin
    raise exception 'the audit is append-only: nothing of it is changed or removed'
        using errcode = 'insufficient_privilege';
end
$$;
create trigger audit_keep before update or delete or truncate on audit
    for each statement execute function s2s_audit_keep();
alter table audit enable always trigger audit_keep;

-- Whoever changes one of these tables, by whatever means, is named: the actor that the transaction says, else the user.
create function s2s_actor() returns text language sql stable as $$
    select coalesce(nullif(current_setting('s2s.actor', true), ''), session_user)
$$;

-- What a statement is part of, as the transaction says, else in the word given.
create function s2s_action(otherwise text) returns text language sql stable as $$
    select coalesce(nullif(current_setting('s2s.action', true), ''), otherwise)
$$;

create function s2s_audit_order() returns trigger language plpgsql as $$
begin
    insert into audit (actor, action, subject, params, result)
    values (new.actor, new.rpc, new.order_id, new.params, case tg_op when 'UPDATE' then
        jsonb_build_object('status', new.status, 'result', new.result, 'engine', new.engine, 'way', new.way) end);
    return null;
end
$$;
create trigger orders_given after insert on orders for each row execute function s2s_audit_order();
create trigger orders_ended after update of status on orders for each row
    when (new.status in ('done', 'refused', 'failed') and old.status is distinct from new.status)
    execute function s2s_audit_order();

create function s2s_audit_config() returns trigger language plpgsql as $$
begin
    insert into audit (actor, action, subject, params, result)
    values (new.actor, s2s_action('config.set'), new.key,
        jsonb_build_object('value', new.new_value),
        jsonb_build_object('version', new.version, 'was', new.old_value));
    return null;
end
$$;
create trigger config_history_audit after insert on config_history for each row execute function s2s_audit_config();

-- Which columns have changed and what they were, and never the secret itself.
create function s2s_audit_key() returns trigger language plpgsql as $$
declare
    before jsonb := case tg_op when 'INSERT' then '{}' else to_jsonb(old) - 'key_b64' end;
    after jsonb := case tg_op when 'DELETE' then '{}' else to_jsonb(new) - 'key_b64' end;
    changed jsonb := (select coalesce(jsonb_object_agg(key, value), '{}') from jsonb_each(after)
        where before -> key is distinct from value);
    was jsonb := (select jsonb_object_agg(key, value) from jsonb_each(before)
        where after -> key is distinct from value);
begin
    if tg_op = 'UPDATE' and old.key_b64 is distinct from new.key_b64 then
        changed := changed || '{"key_b64": "changed"}';
    end if;
    insert into audit (actor, action, subject, params, result)
    values (s2s_actor(), s2s_action(case tg_op when 'INSERT' then 'keys.add' when 'UPDATE' then 'keys.change'
        else 'keys.delete' end), coalesce(after ->> 'key_id', before ->> 'key_id'), changed,
        case when was is not null then jsonb_build_object('was', was) end);
    return null;
end
$$;
create trigger s2s_keys_audit after insert or delete on s2s_keys for each row execute function s2s_audit_key();
create trigger s2s_keys_audit_change after update on s2s_keys for each row
    when (old.* is distinct from new.*) execute function s2s_audit_key();

create function s2s_audit_keys_truncate() returns trigger language plpgsql as $$
begin
    insert into audit (actor, action, subject, result)
    select s2s_actor(), s2s_action('keys.delete'), key_id, jsonb_build_object('was', to_jsonb(k) - 'key_b64')
    from s2s_keys k;
    return null;
end
$$;
create trigger s2s_keys_audit_truncate before truncate on s2s_keys
    for each statement execute function s2s_audit_keys_truncate();

-- What is wanted of an engine.
create function s2s_audit_engine() returns trigger language plpgsql as $$
begin
    insert into audit (actor, action, subject, params)
    values (s2s_actor(), s2s_action('engine.wanted'), coalesce(new.name, old.name),
        jsonb_build_object('wanted', coalesce(new.wanted, 'running'), 'reason', coalesce(new.reason, '')));
    return null;
end
$$;
create trigger engines_audit after insert or delete on engines for each row execute function s2s_audit_engine();
create trigger engines_audit_change after update on engines for each row
    when ((old.wanted, old.reason) is distinct from (new.wanted, new.reason)) execute function s2s_audit_engine();

-- What an operator asked of an engine: once a server has it, which may die with it, and once the answer is known.
create function s2s_audit_steering() returns trigger language plpgsql as $$
begin
    insert into audit (actor, action, subject, params, result)
    values (new.actor, new.type, new.engine, new.payload, case when new.answered_at is not null then
        jsonb_build_object('ok', new.is_ok) || coalesce(new.answer, '{}') end);
    return null;
end
$$;
create trigger steering_taken after update of taken_by on steering for each row
    when (new.taken_by is distinct from old.taken_by and new.type <> 's2s.health.check')
    execute function s2s_audit_steering();
create trigger steering_answered after update of answered_at on steering for each row
    when (new.answered_at is distinct from old.answered_at and new.type <> 's2s.health.check')
    execute function s2s_audit_steering();
