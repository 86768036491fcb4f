-- The HTTP API. docs/api.rst says what it means.

-- Tokens ---------------------------------------------------------------------------------------------------------

-- Of a token only its hash is kept; one that is revoked is removed, and the audit remembers it.
create table api_tokens (
    name text primary key check (name ~ '^[A-Za-z0-9_.-]{1,64}$'),
    role text not null check (role in ('observer', 'operator', 'admin')),
    token_sha256 bytea not null check (octet_length(token_sha256) = 32),
    note text not null default '',
    created_at timestamptz not null default now(),
    created_by text not null default s2s_actor(),
    -- Within the years that every reader has.
    expires_at timestamptz check (expires_at between '2000-01-01' and '9999-01-01')
);
create trigger api_tokens_notify after insert or update or delete or truncate on api_tokens
    for each statement execute function s2s_notify('s2s_tokens');

-- As with keys, and never the hash.
create function s2s_audit_token() returns trigger language plpgsql as $$
declare
    token api_tokens := case tg_op when 'DELETE' then old else new end;
begin
    insert into audit (actor, action, subject, params)
    values (s2s_actor(), s2s_action(case tg_op when 'INSERT' then 'tokens.add' when 'UPDATE' then 'tokens.change'
        else 'tokens.revoke' end), token.name, to_jsonb(token) - '{name,token_sha256,created_at,created_by}'::text[]);
    return null;
end
$$;
create trigger api_tokens_audit after insert or update or delete on api_tokens
    for each row execute function s2s_audit_token();

-- Waiting for an answer ------------------------------------------------------------------------------------------

create trigger orders_over after update of status on orders for each row
    when (new.status in ('done', 'refused', 'failed') and old.status is distinct from new.status)
    execute function s2s_notify('s2s_orders_over');
create trigger steering_over after update of answered_at on steering for each row
    when (new.answered_at is distinct from old.answered_at) execute function s2s_notify('s2s_steering_over');

-- Looking through pages ------------------------------------------------------------------------------------------

create index orders_newest on orders (created_at, order_id);
