// A client of echo.mjs: node talk.mjs NAME ROOT.PEM. It ends well only if all was as
// it has to be.
import assert from 'node:assert/strict'
import { randomBytes } from 'node:crypto'
import { readFileSync } from 'node:fs'
import { get } from 'node:https'
import { once } from 'node:events'
import { setTimeout as sleep } from 'node:timers/promises'
import WebSocket from 'ws'

const [name, root] = process.argv.slice(2)
const way = {
  ca: readFileSync(root),
  lookup: (_, options, found) =>
    options.all ? found(null, [{ address: '127.0.0.1', family: 4 }]) : found(null, '127.0.0.1', 4),
}

async function open(protocols = [], options = {}) {
  const socket = new WebSocket(`wss://${name}/`, protocols, { ...way, maxPayload: 64 << 20, ...options })
  socket.inbox = []
  socket.on('message', (data, isBinary) => {
    socket.inbox.push([isBinary ? data : data.toString(), isBinary])
    socket.emit('more')
  })
  socket.ended = new Promise((resolve) =>
    socket.on('close', (code, reason) => resolve(`${code} ${reason}`)),
  )
  socket.next = async () => {
    while (socket.inbox.length === 0) await once(socket, 'more')
    return socket.inbox.shift()
  }
  await once(socket, 'open')
  return socket
}

async function closed() {
  const request = get(`https://${name}/closed`, way)
  const [response] = await once(request, 'response')
  let text = ''
  for await (const piece of response) text += piece
  return text
}

const steps = {
  async 'messages of every size come back'() {
    for (const perMessageDeflate of [false, true]) {
      const socket = await open([], { perMessageDeflate })
      for (const size of [0, 1, 125, 126, 65535, 65536, 1 << 20, 20 << 20]) {
        const bytes = randomBytes(size)
        socket.send(bytes)
        const [back, isBinary] = await socket.next()
        assert.ok(isBinary && back.equals(bytes), `${size} bytes`)
      }
      socket.send('grüße 🦀')
      assert.deepEqual(await socket.next(), ['grüße 🦀', false])
      assert.equal(socket.extensions, perMessageDeflate ? 'permessage-deflate' : '')
      socket.close()
      await socket.ended
    }
  },
  async 'many messages come back in their order'() {
    const socket = await open()
    for (let number = 0; number < 10000; number += 1) socket.send(`message ${number}`)
    for (let number = 0; number < 10000; number += 1) {
      assert.deepEqual(await socket.next(), [`message ${number}`, false])
    }
    socket.close()
    await socket.ended
  },
  async 'the server chooses among protocols and sees where the visitor comes from'() {
    const socket = await open(['one', 'two'])
    assert.equal(socket.protocol, 'two')
    socket.send('headers')
    const headers = JSON.parse((await socket.next())[0])
    assert.equal(headers.host, name)
    assert.equal(headers['x-forwarded-proto'], 'https')
    assert.equal(headers['x-forwarded-for'], '127.0.0.1')
    assert.equal(headers.via, '1.1 supvm')
    socket.close()
    await socket.ended
  },
  async 'a close of the client reaches the server with code and reason'() {
    const socket = await open()
    socket.close(4001, 'enough of this')
    assert.equal(await closed(), '4001 enough of this')
    assert.equal(await socket.ended, '4001 enough of this')
  },
  async 'a close of the server reaches the client with code and reason'() {
    const socket = await open()
    socket.send('close 4002 no more')
    assert.equal(await socket.ended, '4002 no more')
    assert.equal(await closed(), '4002 no more')
  },
  async 'a connection that dies on one side dies on the other'() {
    const socket = await open()
    socket.on('error', () => {})
    socket.send('die')
    assert.equal(await socket.ended, '1006 ')
    const other = await open()
    other.terminate()
    assert.equal(await closed(), '1006 ')
  },
  async 'a quiet connection lives on, and pings pass'() {
    const socket = await open()
    // Longer than unused connections are kept on either side.
    await sleep(6000)
    socket.send('ping')
    assert.deepEqual(await socket.next(), ['pong are you there', false])
    socket.close(1000)
    assert.equal(await socket.ended, '1000 ')
  },
}

for (const [promise, step] of Object.entries(steps)) {
  console.log(promise)
  await step()
}
console.log('all well')
